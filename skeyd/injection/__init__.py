"""A system call in another process: one of its threads is stopped, makes the call, and puts itself back.

For VMs that a running QEMU owns: the kernel answers EIO to every other address space. Standard library only, nothing
here knows of VMs as skeyd's clients do. How it works and why no instant is unsafe is in docs/injection.md.
"""
