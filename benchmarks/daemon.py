"""skeyd with what only a benchmark may change; skeyd itself has no switch for any of it.

    python -m benchmarks.daemon [--slow-source] [--streams N] [--any-address] -- SKEYD'S OPTIONS

--slow-source  simulated VMs take their time for each key they are read (benchmarks/slow_worker.py)
--streams      as many key streams at once
--any-address  TCP on any address, for a network namespace that nobody else is in
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skeyd import limits


def main() -> None:
    """Change what is to be changed, and be skeyd."""
    at = sys.argv.index("--")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.daemon")
    parser.add_argument("--slow-source", action="store_true")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--any-address", action="store_true")
    options = parser.parse_args(sys.argv[1:at])
    # The constants are final to everybody else, hence setattr. Limits come first: others take them when imported.
    if options.streams is not None:
        # All streams are of one VM, which alone has half of them.
        setattr(limits, "MAX_KEY_STREAMS", 2 * options.streams)  # noqa: B010
    from skeyd import server
    from skeyd.vms import starter

    if options.any_address:
        setattr(server, "_loopback", str)  # noqa: B010
    if options.slow_source:
        setattr(starter, "_WORKER", str(Path(__file__).with_name("slow_worker.py")))  # noqa: B010
    server.main(sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
