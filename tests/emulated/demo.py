"""The demo of examples/demo.py on a real s390x kernel: `make demo-s390x`. Builds the emulated host where it must."""

import sys

from examples.demo import say, show
from skeyd.client import Client
from skeyd.v1 import vm_pb2
from tests.emulated.daemon import DaemonInside
from tests.emulated.host import EmulatedHost
from tests.emulated.image import Image


def main() -> int:
    """Boot, start the daemon there, and do the main job from here over TCP; the exit status."""
    image = Image("bookworm")
    reason = image.missing()
    if reason is not None:
        sys.stderr.write(f"{reason}\n")
        return 1
    say("skeyd: a guest's storage keys, set and read over gRPC, on a real s390x kernel.")
    if not image.is_built():
        say("Building the emulated host: some five minutes, once …")
        image.build()
    say("Booting it: some ten seconds …")
    with EmulatedHost(image) as host:
        say(f"Linux {host.kernel} runs. The daemon is in there, its client out here.\n")
        host.run(["sysctl", "-w", "vm.allocate_pgste=1"])
        DaemonInside.install(host)
        daemon = DaemonInside(host)
        daemon.start()

        def restart() -> Client:
            daemon.kill()
            daemon.start()
            return daemon.connect()

        with daemon.connect() as client:
            show(client, "demo", vm_pb2.VM_KIND_OWNED, restart)
    say("\nNo key was lost and none invented.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
