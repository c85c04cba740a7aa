"""VMs on the shared daemon."""

from tests.rpc.fixtures import new_vm, stubs
from tests.rpc.setting import old_vm, vm

__all__ = ["new_vm", "old_vm", "stubs", "vm"]
