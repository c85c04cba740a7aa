"""A VM that another process owns: the storage-key ioctls on it, made by one of that process's threads."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NoReturn, Self

from skeyd.injection.buffer import Buffer
from skeyd.injection.errors import (
    BufferLostError,
    GoneError,
    InjectionError,
    NotAllowedError,
    NoVmError,
    RefusedError,
    TimedOutError,
)
from skeyd.injection.frozen import Frozen
from skeyd.injection.injection import Injection
from skeyd.injection.target import Target
from skeyd.kvm import abi
from skeyd.kvm.errors import KvmError
from skeyd.kvm.slices import FIRST_KEYS, next_keys
from skeyd.kvm.vm import take_keyop, take_skeys
from skeyd.storage_key import FRAME_SIZE

HEAD: Final = 64
"""Bytes at the buffer's beginning for an ioctl's argument; keys lie behind them."""

_SEVERAL: Final = 512
"""Calls of one key at most that are prepared at once."""
_SLICE_CALLS: Final = 16
"""So many of them a slice has at least; more while there is time. Microseconds each where nothing is emulated."""
_SLICE_SECONDS: Final = 0.005
"""How long it goes on making them."""

_SANDBOX: Final = (errno.EPERM, errno.EACCES, errno.ENOSYS)
"""What none of the ioctls answers: it is seccomp's answer then, or another security module's."""


class ForeignVm:
    """A VM by its descriptor in another process. As skeyd.kvm.vm.Vm, call by call and KvmError by KvmError.

    A call is one slice: the thread is held for the ioctl and not while keys are copied, `seconds` at most. Its buffer
    in the process, of `most_keys` and some, is there from the constructor to `close`.

    InjectionErrors are about the process and not the VM: GoneError, NoVmError, AlreadyTracedError, NotAllowedError,
    RefusedError (a sandbox), TimedOutError (an ioctl may have been made or not), BufferLostError, UnsupportedError, and
    from the constructor InUseError.

    Synchronization: none.
    """

    def __init__(self, target: Target, fd: int, most_keys: int, seconds: float) -> None:
        self._target = target
        self._fd = fd
        self._most = most_keys
        self._seconds = seconds
        self._buffer: Buffer | None = None
        with self._slice() as injection:
            self._buffer = Buffer.open(injection, HEAD + most_keys)

    def check_extension(self, capability: int) -> int:
        """Ask KVM_CHECK_EXTENSION of the VM: 0 for no."""
        with self._memory():
            pass  # as all calls: not of one that is closed
        return self._ioctl(abi.KVM_CHECK_EXTENSION, capability)

    def get_skeys(self, start_gfn: int, buffer: memoryview) -> bool:
        """As skeyd.kvm.vm.Vm.get_skeys."""
        uses_keys = self._skeys(abi.KVM_S390_GET_SKEYS, start_gfn, buffer.nbytes)
        if uses_keys:
            with self._memory() as memory:
                memory.read_into(HEAD, buffer)
        return uses_keys

    def set_skeys(self, start_gfn: int, buffer: memoryview) -> None:
        """As skeyd.kvm.vm.Vm.set_skeys."""
        self._require_room(buffer.nbytes)
        with self._memory() as memory:
            memory.write(HEAD, bytes(buffer))
        self._skeys(abi.KVM_S390_SET_SKEYS, start_gfn, buffer.nbytes)

    def look_at_skeys(self, start_gfn: int, count: int) -> bool:
        """As get_skeys, of `count` frames, for who wants to know only whether that can be done."""
        return self._skeys(abi.KVM_S390_GET_SKEYS, start_gfn, count)

    def first_of(self, gfns: Sequence[int]) -> int | None:
        """Return the first of these frames that is in a memory slot, None where none is. KvmError; many calls a slice.

        Of a guest that uses no storage keys that is always the very first (docs/kernel.md).
        """
        for begin in range(0, len(gfns), _SEVERAL):
            some = gfns[begin : begin + _SEVERAL]
            with self._memory() as memory:
                # One argument after another; behind them a byte for any of the keys.
                key = memory.address + HEAD + len(some) * abi.kvm_s390_skeys.size
                memory.write(HEAD, b"".join(abi.kvm_s390_skeys.pack(gfn, 1, key, 0) for gfn in some))
            index = self._first_taken(memory.address + HEAD, len(some))
            if index is not None:
                return some[index]
        return None

    def keyop(self, operation: int, gfn: int, key: int = 0) -> int:
        """As skeyd.kvm.vm.Vm.keyop."""
        with self._memory() as memory:
            memory.write(0, abi.kvm_s390_keyop.pack(gfn * FRAME_SIZE, key, operation))
        result = self._ioctl(abi.KVM_S390_KEYOP, memory.address)
        with self._memory() as memory:
            return take_keyop(result, memory.read(0, abi.kvm_s390_keyop.size))

    def read_frozen(
        self, parts: Iterable[tuple[int, int]], into: memoryview, seconds: float, slice_seconds: float
    ) -> bool:
        """Fill `into` with the keys of parts, each (first gfn, count), end to end, while no thread of the process runs.

        As get_skeys, but all of it is one slice: it takes `seconds` at most, TimedOutError, and an ioctl about
        `slice_seconds`. For a process that ends afterwards: see Frozen.
        """
        self._require_vm()
        end = time.monotonic() + seconds
        with Frozen(self._target, seconds) as injection:
            self._require_vm()
            done, count = 0, FIRST_KEYS
            for start, keys in parts:
                gfn = start
                while gfn < start + keys:
                    count = min(count, start + keys - gfn, self._most)
                    began = time.monotonic()
                    if not self._read_held(injection, gfn, into[done : done + count], end):
                        return False
                    gfn, done = gfn + count, done + count
                    count = next_keys(count, time.monotonic() - began, slice_seconds)
        return True

    def _read_held(self, injection: Injection, gfn: int, into: memoryview, end: float) -> bool:
        request, pid = abi.KVM_S390_GET_SKEYS, self._target.pid
        with self._memory() as memory:
            memory.write(0, abi.kvm_s390_skeys.pack(gfn, into.nbytes, memory.address + HEAD, 0))
            answer = None
            while answer is None:
                if time.monotonic() >= end:
                    raise TimedOutError(pid, f"the keys of process {pid} were not all read in time")
                answer = self._answer(injection, request, memory.address)
            if not take_skeys(request, answer):
                return False
            memory.read_into(HEAD, into)
        return True

    def close(self) -> None:
        """Unmap the buffer; nothing the second time, nor where the process has ended. It may be tried again."""
        if self._buffer is None:
            return
        try:
            with Injection(self._target, seconds=self._seconds) as injection:
                self._buffer.close(injection)
        except (GoneError, OSError):
            # The process has ended, or a thread of it, or the memory is no longer there.
            if self._is_running() and self._buffer.is_there():
                raise
        self._buffer = None

    def _require_room(self, count: int) -> None:
        # The kernel writes as many, whatever lies behind the buffer.
        if count > self._most:
            raise ValueError(f"{count} keys are more than {self._most}")

    def _skeys(self, request: int, start_gfn: int, count: int) -> bool:
        self._require_room(count)
        with self._memory() as memory:
            memory.write(0, abi.kvm_s390_skeys.pack(start_gfn, count, memory.address + HEAD, 0))
        return take_skeys(request, self._ioctl(request, memory.address))

    def _ioctl(self, request: int, argument: int) -> int:
        end = time.monotonic() + self._seconds
        while True:
            with self._slice() as injection:
                answer = self._answer(injection, request, argument)
            if answer is not None:
                return answer
            self._require_time(request, end)

    def _answer(self, injection: Injection, request: int, argument: int) -> int | None:
        """Make an ioctl: its answer, or None: it was interrupted, and is to be made again."""
        try:
            return injection.ioctl(self._fd, request, argument)
        except RefusedError as error:
            if error.errno == errno.EINTR:
                return None
            if error.by_seccomp or error.errno in _SANDBOX:
                raise
            if error.errno in (errno.EBADF, errno.ENOTTY):
                self._require_vm()
            raise KvmError(abi.NAMES[request], error.errno) from error

    def _first_taken(self, address: int, count: int) -> int | None:
        # Make GETs with one argument after another, until one succeeds.
        index, end = 0, time.monotonic() + self._seconds
        while index < count:
            with self._slice() as injection:
                least, slice_end = index + _SLICE_CALLS, time.monotonic() + _SLICE_SECONDS
                while index < count and (index < least or time.monotonic() < slice_end):
                    taken = self._is_taken(injection, address + index * abi.kvm_s390_skeys.size)
                    if taken is None:
                        break
                    if taken:
                        return index
                    index, end = index + 1, time.monotonic() + self._seconds
            self._require_time(abi.KVM_S390_GET_SKEYS, end)
        return None

    def _is_taken(self, injection: Injection, argument: int) -> bool | None:
        # None: it was interrupted.
        try:
            answer = self._answer(injection, abi.KVM_S390_GET_SKEYS, argument)
            if answer is None:
                return None
            take_skeys(abi.KVM_S390_GET_SKEYS, answer)
        except KvmError as error:
            if error.errno != errno.EFAULT:
                raise
            return False
        return True

    def _require_time(self, request: int, end: float) -> None:
        # As in skeyd.kvm.ioctl, what is interrupted is made again, but not for ever: it is we who interrupt what takes
        # too long.
        if time.monotonic() >= end:
            pid = self._target.pid
            raise TimedOutError(pid, f"{abi.NAMES[request]} in process {pid} was interrupted each time")

    @contextmanager
    def _slice(self) -> Iterator[Injection]:
        self._require_vm()
        with Injection(self._target, seconds=self._seconds) as injection:
            # Once more, after what may have been a wait: other threads can still close it, but this one can't.
            self._require_vm()
            yield injection

    def _require_vm(self) -> None:
        pid = self._target.pid
        try:
            if self._target.is_vm(self._fd):
                return
        except PermissionError as error:
            raise NotAllowedError(pid, f"the descriptors of process {pid} can't be read") from error
        self._target.check()
        raise NoVmError(pid, self._fd)

    def _is_running(self) -> bool:
        try:
            self._target.check()
        except GoneError:
            return False
        return True

    @contextmanager
    def _memory(self) -> Iterator[Buffer]:
        if self._buffer is None:
            raise InjectionError(self._target.pid, "this ForeignVm is closed")
        # Each time, before anything is written: the memory can be another's by now, or even another process's.
        self._target.check()
        if not self._buffer.is_there():
            self._lost()
        try:
            yield self._buffer
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError | None = None) -> NoReturn:
        self._target.check()
        pid = self._target.pid
        raise BufferLostError(pid, f"process {pid} has unmapped the buffer for its calls") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except InjectionError:
            if error is None:
                raise
