"""VMs on the shared daemon."""

from tests.rpc.fixtures import new_vm, stubs

__all__ = ["new_vm", "stubs"]
