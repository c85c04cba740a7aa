"""The main job, start to end: `make demo`. Starts a daemon of its own in a temporary directory and clears it away."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from skeyd.client import Client, Gap, Keys, connect
from skeyd.gfn import GfnRange
from skeyd.storage_key import FRAME_SIZE, StorageKey, differing_runs
from skeyd.v1 import vm_pb2, vm_service_pb2

MIB = 1 << 20
SLOTS = ((0, 256 * MIB), (4096 * MIB, 64 * MIB))
"""Address and size in bytes: two slots with a hole between them."""


def say(text: str = "") -> None:
    """Tell the audience."""
    print(text, flush=True)


def keys_of(frames: GfnRange) -> bytes:
    """Make up keys as a guest has them: areas of one key, here and there a page of its own."""
    maker = random.Random(frames.start)  # noqa: S311  a demo's keys, no secrets
    keys = bytearray()
    while len(keys) < frames.count:
        key = StorageKey(maker.randrange(16), maker.random() < 0.3, False, False).to_byte()
        keys += bytes([key]) * min(maker.choice((1, 16, 256, 4096)), frames.count - len(keys))
    return bytes(keys)


def picture(keys: bytes) -> str:
    """Draw keys as a line of 64 marks: the access-control bits of each part's first frame."""
    step = len(keys) // 64
    return "".join("·0123456789ABCDEF"[(keys[at] >> 4) + 1] if keys[at] else "·" for at in range(0, 64 * step, step))


def show(client: Client, name: str, kind: vm_pb2.VmKind.ValueType, restart: Callable[[], Client]) -> None:
    """Do the main job on one daemon, and see that a killed one loses nothing."""
    request = vm_service_pb2.CreateVmRequest(vm_id=name, kind=kind)
    if kind == vm_pb2.VM_KIND_SIMULATED:
        request.simulated_kernel = vm_pb2.SIMULATED_KERNEL_LINUX_4_19
    for address, size in SLOTS:
        request.memory_slots.add(guest_phys_addr=address, memory_size=size)
    vm = client.create_vm(request)
    say(f"1. created    {vm.name}: {vm.kernel}, worker process {vm.worker_pid}")
    ranges = [GfnRange(address // FRAME_SIZE, size // FRAME_SIZE) for address, size in SLOTS]
    for one in ranges:
        say(f"              memory slot {one} ({one.count} frames)")

    wanted = {one: keys_of(one) for one in ranges}
    started = time.monotonic()
    chunks = [Keys(frames, keys) for frames, keys in wanted.items()]
    result = client.set_skeys(vm.name, ranges, chunks, allow_enable=True)
    took = (time.monotonic() - started) * 1000
    say(f"2. set        {result.keys_set} keys in {took:.0f} ms; the kernel had silently lost {result.keys_repaired},")
    say("              found by reading back, and set again")

    verify(client, vm.name, wanted, "3. streamed  ")
    say("4. killed     the daemon, with SIGKILL, and started another")
    with restart() as again:
        found = again.get_vm(vm.name)
        say(f"5. found      {found.name} again: the same worker process {found.worker_pid}, the same incarnation")
        if (found.uid, found.incarnation) != (vm.uid, vm.incarnation):
            raise SystemExit("it is another VM")
        verify(again, vm.name, wanted, "6. verified  ")
        again.delete_vm(vm.name)
        say(f"7. deleted    {vm.name}; VMs left: {len(again.list_vms())}")


def verify(client: Client, name: str, wanted: dict[GfnRange, bytes], title: str) -> None:
    """Stream all keys back and compare access-control bits and fetch protection with what was set."""
    started = time.monotonic()
    parts: list[Keys | Gap] = []
    with client.get_skeys(name) as stream:
        parts.extend(stream)
    took = (time.monotonic() - started) * 1000
    found = dict.fromkeys(wanted, b"")
    for part in parts:
        for frames in found:
            if isinstance(part, Keys) and frames.start <= part.frames.start < frames.end:
                found[frames] += part.keys
    wrong = sum(length for frames, keys in wanted.items() for _, length in differing_runs(keys, found[frames]))
    chunks = sum(isinstance(part, Keys) for part in parts)
    count = sum(map(len, found.values()))
    say(f"{title} {count} keys back in {chunks} chunks and {len(parts) - chunks} gap, {took:.0f} ms; {wrong} differ")
    for frames, keys in found.items():
        say(f"              {frames!s:<19} {picture(keys)}")
    if wrong:
        raise SystemExit("keys differ")


class Daemon:
    """A daemon on a runtime directory."""

    def __init__(self, runtime_dir: str) -> None:
        self._command = [sys.executable, "-m", "skeyd.server", "--runtime-dir", runtime_dir]
        self._target = f"unix:{runtime_dir}/skeyd.sock"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Client:
        """Start it, wait until it serves, connect."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None  # noqa: S101  it is a pipe
        for line in self._process.stderr:
            if json.loads(line)["event"] == "serving":
                return connect(self._target)
        raise SystemExit("the daemon did not start")

    def restart(self) -> Client:
        """Kill it and start another."""
        self.stop(signal.SIGKILL)
        return self.start()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.communicate()


def main() -> None:
    """Run the demo on a simulated VM, which needs no kernel of any kind."""
    say("skeyd: a guest's storage keys, set and read over gRPC.")
    say("The VM is simulated: it follows the rules of Linux 4.19 to 6.19, lost keys included.")
    say("`make demo-s390x` does the same on a real s390x kernel.\n")
    with tempfile.TemporaryDirectory(prefix="skeyd-demo-") as directory:
        daemon = Daemon(f"{directory}/run")
        try:
            with daemon.start() as client:
                show(client, "demo", vm_pb2.VM_KIND_SIMULATED, daemon.restart)
        finally:
            # Workers outlive the daemon: whatever happened above, this one must not outlive the demo.
            with daemon.restart() as client:
                for vm in client.list_vms():
                    client.delete_vm(vm.name)
            daemon.stop()
    say("\nNo key was lost and none invented.")


if __name__ == "__main__":
    main()
