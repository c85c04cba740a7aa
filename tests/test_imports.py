"""Imports go one way, and some modules are for a few places only. `make lint` has the layers; this has the rest."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import skeyd

ROOT = Path(skeyd.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if "v1" not in path.relative_to(ROOT).parts)

# Who may import what, by the part of skeyd that the module lies in; "." are the modules beside the folders.
LEAVES = {
    "capabilities",
    "checksum",
    "digest",
    "encoding",
    "errors",
    "gfn",
    "limits",
    "linux",
    "paths",
    "storage_key",
    "summary",
    "turns",
    "wire",
}
NOT_FOR_WORKERS = {"checksum", "digest", "encoding", "limits", "paths", "summary", "turns", "wire"}
MAY_IMPORT_OF_SKEYD = {
    "kvm": {"kvm", "linux", "storage_key"},
    "injection": {"injection", "kvm", "storage_key"},
    "qmp": {"qmp", "linux"},
    "worker": {"worker", "injection", "qmp", "kvm", *(LEAVES - NOT_FOR_WORKERS)},
    "vms": {
        "vms",
        "worker.protocol",
        "worker.packets",
        "worker.adoption",
        "worker.candidates",
        "worker.outcomes",
        "worker.channel",
        *LEAVES,
    },
    "rpc": {
        "rpc",
        "vms",
        "worker.protocol",
        "worker.packets",
        "worker.adoption",
        "worker.candidates",
        "worker.vmm_name",
        "worker.outcomes",
        "worker.slots",
        "v1",
        "standard",
        *LEAVES,
    },
    "client": {"client", "v1", "standard", *LEAVES},
    "cli": {"cli", "client", "v1", *LEAVES},
}
ONLY_IN = {
    "fcntl": {"kvm", "linux"},
    # For what Python can't do: ioctl arguments that hold an address; mallopt; ptrace; capset.
    "ctypes": {"kvm", "malloc", "injection", "capabilities"},
    "grpc": {"rpc", "client", "server", "cli.skeyctl"},
    "google": {"rpc", "standard"},
    "structlog": {"rpc", "server", "logs"},
    "click": {"cli"},
    "logging": {"logs"},
    "zstandard": {"encoding.zstd"},
}


def imports(path: Path) -> set[str]:
    """Return the full names of all modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found.add(str(node.module))
            # `from skeyd.kvm import abi` imports a module too; a name that is none does no harm here.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place(path: Path) -> str:
    """Return a module's name without "skeyd."."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_below(name: str, places: set[str]) -> bool:
    """Whether a module is one of the places or lies below one."""
    return any(name == one or name.startswith(one + ".") for one in places)


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_a_part_imports_only_what_lies_below_it(path: Path) -> None:
    part = place(path).partition(".")[0]
    if part not in MAY_IMPORT_OF_SKEYD:
        return
    own = {name.removeprefix("skeyd.") for name in imports(path) if name.startswith("skeyd.")}
    modules = {name for name in own if (ROOT / name.replace(".", "/")).is_dir() or is_module(name)}
    assert {name for name in modules if not is_below(name, MAY_IMPORT_OF_SKEYD[part])} == set()


def is_module(name: str) -> bool:
    """Whether skeyd has a module of that name."""
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_a_library_stays_in_its_places(module: str) -> None:
    users = {place(path) for path in MODULES if is_below_module(imports(path), module)}
    assert users, f"nobody imports {module}: take it off the list"
    assert {user for user in users if not is_below(user, ONLY_IN[module])} == set()


def is_below_module(names: set[str], module: str) -> bool:
    """Whether one of the names is the module or lies in it."""
    return any(name == module or name.startswith(module + ".") for name in names)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if place(path).partition(".")[0] in ("kvm", "injection", "qmp", "worker") or place(path) in LEAVES
    ],
    ids=place,
)
def test_what_a_worker_loads_is_the_standard_library(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path)}
    assert roots - {"skeyd"} <= set(sys.stdlib_module_names)
