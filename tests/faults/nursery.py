"""A process that has loaded everything and forks: a front, or a client, is there in a few milliseconds.

`python -m tests.faults.nursery FD`: takes orders on a socket, each with descriptors for the child, and answers with its
pid. Whoever is orphaned below it becomes its child, so the workers of a front that was killed are its own; when the
socket's other end is closed it ends them all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from tests.faults import calls, front_points
from tests.faults.trigger import Trigger
from tests.processes import adopt_orphans, children, end

_ORDER_MAX = 1 << 16


def main(orders: socket.socket) -> None:
    """Fork as ordered until there is nobody to order."""
    adopt_orphans()
    # Nobody waits for them: who wants to know of an end has a descriptor of the process.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "who forks has one thread"
    orders.send(b"ready")
    while True:
        data, fds, _, _ = socket.recv_fds(orders, _ORDER_MAX, 4)
        if not data:
            break
        pid = os.fork()
        if not pid:
            status = 1
            try:
                orders.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _be(json.loads(data), fds)
                status = 0
            finally:
                os._exit(status)
        for fd in fds:
            os.close(fd)
        orders.send(str(pid).encode())
    while left := children():
        for process in left:
            end(process)


def _be(order: dict[str, str], fds: list[int]) -> None:
    log, out = fds
    os.dup2(log, 2)
    os.close(log)
    if order["role"] == "front":
        front_points.run(order["runtime_dir"], out)
        return
    plan = json.loads(order["plan"])
    plan["keys"] = bytes.fromhex(plan["keys"])
    plan["ranges"] = tuple(map(tuple, plan["ranges"]))
    trigger = Trigger("client", order["runtime_dir"])
    with calls.Connection(order["target"]) as connection:
        told = calls.set_skeys(connection, calls.Plan(**plan), trigger.at)
        with open(out, "wb") as file:  # noqa: PTH123  a descriptor
            file.write(told.written())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        main(given)
