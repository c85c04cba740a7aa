"""The runtime directory: one front at a time, one directory a VM.

RUNTIME/front.lock               locked while a front runs; holds its pid
RUNTIME/skeyd.sock               the gRPC socket
RUNTIME/vms/ID/vm.json           what was asked for, written before the worker is started
RUNTIME/vms/ID/worker.lock       locked for as long as the worker lives
RUNTIME/vms/ID/worker.sock       where the worker listens
RUNTIME/vms/ID/worker.log        the worker's standard error
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from skeyd import paths
from skeyd.errors import Reason, SkeydError, exhausted
from skeyd.linux import lock_is_held, take_lock
from skeyd.worker.packets import MESSAGE_MAX, Fields, ProtocolError, decode, encode
from skeyd.worker.protocol import LOCK, SOCKET, VM_ID, Spec

RECORD: Final = "vm.json"
LOG: Final = "worker.log"
_LOG_END: Final = 1024
"""Bytes of a worker's log that are looked at for its last words."""

_FRONT_LOCK: Final = "front.lock"
_VMS: Final = "vms"
_FILES: Final = (SOCKET, LOG, RECORD, RECORD + ".new", LOCK)
# No VM's id begins with a dot.
_NEW: Final = ".new-"
_REMOVED: Final = ".removed-"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class RuntimeDirectoryError(Exception):
    """The runtime directory can't be used. The message says why and what to do."""


class RuntimeDirectory:
    """A runtime directory that this process holds the lock of.

    RuntimeDirectoryError from `open`: another front runs on it, or it is not safe.
    """

    def __init__(self, path: Path, vms_fd: int) -> None:
        self.path = path
        self._vms_fd = vms_fd

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[RuntimeDirectory]:
        """Make the directory where it is missing (mode 0700), check that it is private, take its lock."""
        path = path.absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(path)
            lock_fd = os.open(path / _FRONT_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RuntimeDirectoryError(f"{path}: {error.strerror}") from error
        try:
            if not take_lock(lock_fd):
                pid = os.pread(lock_fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
                raise RuntimeDirectoryError(
                    f"another skeyd (pid {pid}) runs on {path}; stop it, or give this one its own --runtime-dir"
                )
            vms = path / _VMS
            try:
                os.ftruncate(lock_fd, 0)
                os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)
                vms.mkdir(mode=0o700, exist_ok=True)
                _require_private(vms)
                vms_fd = os.open(vms, _DIRECTORY_FLAGS)
            except OSError as error:
                raise RuntimeDirectoryError(f"{vms}: {error.strerror}") from error
            try:
                runtime = cls(path, vms_fd)
                runtime._sweep()
                yield runtime
            finally:
                os.close(vms_fd)
        finally:
            os.close(lock_fd)

    @property
    def socket_path(self) -> Path:
        """Where the front listens."""
        return self.path / paths.SOCKET

    def vm_ids(self) -> list[str]:
        """Names of all directories that could be a VM's, in order."""
        return sorted(name for name in self._names() if VM_ID.fullmatch(name))

    def strangers(self) -> list[str]:
        """Names of everything beside them, in order: not skeyd's, and not touched."""
        return sorted(name for name in self._names() if not VM_ID.fullmatch(name))

    def create_vm(self, spec: Spec) -> VmDirectory:
        """Make a VM's directory with its record, both or none. VM_EXISTS where there is one."""
        temporary = f"{_NEW}{spec.uid}"
        os.mkdir(temporary, 0o700, dir_fd=self._vms_fd)
        try:
            fd = os.open(temporary, _DIRECTORY_FLAGS, dir_fd=self._vms_fd)
        except BaseException:
            os.rmdir(temporary, dir_fd=self._vms_fd)
            raise
        directory = VmDirectory(spec.vm_id, fd)
        try:
            directory.write_record(spec)
            # A directory can be renamed over an empty one only, and no VM's is empty.
            os.rename(temporary, spec.vm_id, src_dir_fd=self._vms_fd, dst_dir_fd=self._vms_fd)
        except BaseException as error:
            self._clear(temporary, directory.fd)
            directory.close()
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                name = f"vms/{spec.vm_id}"
                raise SkeydError(Reason.VM_EXISTS, f"{name} exists", {"vm": name}) from None
            raise
        return directory

    @contextmanager
    def open_vm(self, vm_id: str) -> Iterator[VmDirectory]:
        """Hold a VM's directory open. VM_NOT_FOUND where there is none."""
        try:
            fd = os.open(vm_id, _DIRECTORY_FLAGS, dir_fd=self._vms_fd)
        except FileNotFoundError:
            raise SkeydError(Reason.VM_NOT_FOUND, f"there is no vms/{vm_id}", {"vm": f"vms/{vm_id}"}) from None
        except OSError as error:
            if exhausted(error):
                raise  # that says nothing of the VM
            raise SkeydError(Reason.VM_QUARANTINED, f"vms/{vm_id} is no directory of a VM: {error.strerror}") from error
        directory = VmDirectory(vm_id, fd)
        try:
            yield directory
        finally:
            directory.close()

    def evidence(self, vm_id: str) -> tuple[int, ...] | None:
        """Return what tells a VM's directory, record and socket from others of that name; None where one is missing."""
        found: list[int] = []
        try:
            for name in (vm_id, f"{vm_id}/{RECORD}", f"{vm_id}/{SOCKET}"):
                stat_of = os.stat(name, dir_fd=self._vms_fd, follow_symlinks=False)
                # Files come and go in a directory; a record or a socket that changed is another one.
                found += (stat_of.st_dev, stat_of.st_ino, stat_of.st_ctime_ns if name != vm_id else 0)
        except OSError:
            return None
        return tuple(found)

    def require_own_files(self, directory: VmDirectory) -> None:
        """VM_QUARANTINED where files lie in a VM's directory that are not skeyd's."""
        with os.scandir(directory.fd) as entries:
            unknown = sorted(one.name for one in entries if one.name not in _FILES or one.is_dir(follow_symlinks=False))
        if unknown:
            raise SkeydError(
                Reason.VM_QUARANTINED,
                f"the directory of vms/{directory.vm_id} has files that are not skeyd's: {', '.join(unknown[:4])}",
                {"vm": f"vms/{directory.vm_id}"},
            )

    def remove_vm(self, directory: VmDirectory) -> None:
        """Free the name of a VM that has no worker and remove its directory.

        VM_QUARANTINED where files lie in it that are not skeyd's.
        """
        self.require_own_files(directory)
        # Renamed first: a front that dies in the middle leaves no half of a VM under its name.
        temporary = f"{_REMOVED}{os.urandom(8).hex()}"
        os.rename(directory.vm_id, temporary, src_dir_fd=self._vms_fd, dst_dir_fd=self._vms_fd)
        self._clear(temporary, directory.fd)

    def _names(self) -> list[str]:
        # By a descriptor of its own: two that list by the same one share its position, and each misses some.
        fd = os.open(".", _DIRECTORY_FLAGS, dir_fd=self._vms_fd)
        try:
            with os.scandir(fd) as entries:
                return [entry.name for entry in entries]
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        # What a front that died in create_vm or remove_vm left behind; this one holds the lock, so nobody is at it.
        left = [name for name in self._names() if name.startswith((_NEW, _REMOVED))]
        for name in left:
            with suppress(OSError):
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self._vms_fd)
                try:
                    self._clear(name, fd)
                finally:
                    os.close(fd)

    def _clear(self, name: str, fd: int) -> None:
        for file in _FILES:
            with suppress(FileNotFoundError):
                os.unlink(file, dir_fd=fd)
        os.rmdir(name, dir_fd=self._vms_fd)


class VmDirectory:
    """A VM's directory, held open."""

    def __init__(self, vm_id: str, fd: int) -> None:
        self.vm_id = vm_id
        self.fd = fd

    def write_record(self, spec: Spec) -> None:
        """Write down what was asked for, whole or not at all."""
        temporary = RECORD + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=self.fd), "wb") as file:
            file.write(encode(spec.to_message()))
        os.rename(temporary, RECORD, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def read_record(self) -> Spec:
        """Read it back. ProtocolError where it is missing or none."""
        try:
            # O_NONBLOCK: a FIFO of that name must not hold the front up.
            fd = os.open(RECORD, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ProtocolError(f"{RECORD} is no regular file")
                data = os.read(fd, MESSAGE_MAX + 1)
            finally:
                os.close(fd)
        except OSError as error:
            raise ProtocolError(f"{RECORD}: {error.strerror}") from error
        message: Fields = decode(data, RECORD)
        return Spec.from_message(message)

    def open_log(self) -> int:
        """Open the worker's log for appending."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(LOG, flags, 0o600, dir_fd=self.fd)

    def log_end(self) -> str:
        """Return what `last_words` finds in the worker's log."""
        try:
            fd = os.open(LOG, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
        except OSError:
            return ""
        try:
            return last_words(fd)
        finally:
            os.close(fd)

    def worker_lives(self) -> bool:
        """Whether a worker holds the lock: the one evidence that doesn't depend on its good will."""
        try:
            fd = os.open(LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        try:
            return lock_is_held(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self.fd)


def last_words(fd: int) -> str:
    """Return the last line of a worker's log, of which only the printable is kept; empty if there is none."""
    size = os.fstat(fd).st_size
    lines = os.pread(fd, _LOG_END, max(0, size - _LOG_END)).decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(filter(str.isprintable, last))


def _require_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeDirectoryError(f"{path} is no directory")
    if found.st_uid != os.geteuid():
        raise RuntimeDirectoryError(f"{path} belongs to uid {found.st_uid}, not to uid {os.geteuid()}")
    if found.st_mode & 0o077:
        raise RuntimeDirectoryError(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); chmod it to 0700"
        )
