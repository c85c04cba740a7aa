"""What every boot adds to an image: how to start, and the agent. Changing these makes no image stale."""

import io
from pathlib import Path

from tests.emulated.cpio import CpioWriter

AGENT = Path(__file__).with_name("agent.py")

ADDRESS = "10.0.2.15"  # what QEMU's user network takes its one machine to have
AGENT_PORT = 1  # one that nothing tested here will want

START = "/emulated/start"
SYSTEMD = "/usr/lib/systemd/systemd"

# Busybox where it will do: under emulation a small static program starts several times as fast as a big one.
_START = f"""#!/bin/busybox sh
# The first process of a boot without systemd; a service of one with it.
alias ip='busybox ip' mount='busybox mount' mkdir='busybox mkdir' usleep='busybox usleep'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
if [ $$ = 1 ]; then
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    for directory in /dev/shm /run /tmp; do mount -t tmpfs -o mode=1777 tmpfs $directory; done
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ip link set lo up
    busybox hostname emulated
fi
modprobe kvm && modprobe virtio_net || exit
until ip link set eth0 up 2>/dev/null; do usleep 20000; done
ip address add {ADDRESS}/24 dev eth0
# QEMU reaches what listens on the loopback address only: see EmulatedHost.forward.
echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet
cd /root
exec python3 -I -S /emulated/agent.py {ADDRESS} {AGENT_PORT}
"""

_SERVICE = f"""[Unit]
Description=Runs the commands of an emulated host's tests
FailureAction=poweroff-force
SuccessAction=poweroff-force

[Service]
ExecStart={START}
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
LimitNOFILE=65536
TasksMax=infinity
"""

_UNITS = "etc/systemd/system"


def overlay() -> bytes:
    """Return the cpio archive that goes after the image's own."""
    archive = io.BytesIO()
    with CpioWriter(archive) as cpio:
        cpio.directory("emulated")
        cpio.file("emulated/start", _START.encode(), 0o755)
        cpio.file("emulated/agent.py", AGENT.read_bytes())
        cpio.directory(f"{_UNITS}/multi-user.target.wants")
        cpio.file(f"{_UNITS}/emulated.service", _SERVICE.encode())
        cpio.symlink(f"{_UNITS}/multi-user.target.wants/emulated.service", "../emulated.service")
    return archive.getvalue()
