"""skeyd, the storage-key agent of an IBM Z KVM host.

Nothing is imported here: a worker process imports this package with the standard library only.
"""

__version__ = "0.1.0"
