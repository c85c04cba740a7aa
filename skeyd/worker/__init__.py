"""The process behind one VM, and how the front talks with it. Standard library only, so that it is small and quick.

`python -I -S skeyd/worker/__main__.py` starts it. It exists because a VM belongs to the address space that created it:
it never execs and never forks, and it lives on when the front stops, crashes or is upgraded.
"""
