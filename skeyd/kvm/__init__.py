"""The kernel and nothing else: KVM's files as objects, its calls as methods, its refusals as exceptions.

Nothing here knows of gRPC, protobuf or logging. Facts about the kernel are in docs/kernel.md, with their evidence.
"""
