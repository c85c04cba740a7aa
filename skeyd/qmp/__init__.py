"""A client of QMP, the monitor protocol of QEMU. Standard library only: workers load it, and have no other packages.

What answers may be anybody, and a VMM may be its guest's by now: each byte is checked, and everything has a deadline.
PyPI's `qemu.qmp` is asyncio, and no part of the standard library: docs/qmp.md.
"""
