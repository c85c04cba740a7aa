"""skeyd's own client, told what to do on standard input as benchmarks/peer/client.cc is: get and memory."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from benchmarks.harness import memory_of
from skeyd.client import Client, Keys, connect
from skeyd.gfn import GfnRange


def _get(client: Client, given: dict[str, str]) -> dict[str, Any]:
    count = int(given.get("count", 0))
    ranges = [GfnRange(int(given.get("first", 0)), count)] if count else []
    keys = 0
    begun, begun_cpu = time.perf_counter(), time.process_time()
    with client.get_skeys(given["vm"], ranges, int(given.get("chunk", 0))) as stream:
        for part in stream:
            if isinstance(part, Keys):
                keys += part.frames.count
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - begun_cpu, "keys": keys}


def main() -> None:
    """Serve commands until standard input ends."""
    with connect(sys.argv[1]) as client:
        for line in sys.stdin:
            command, *words = line.split()
            given = dict(word.split("=", 1) for word in words)
            try:
                if command == "get":
                    answer = _get(client, given)
                elif command == "memory":
                    found = memory_of("self")
                    answer = {"now_kib": found.resident, "most_kib": found.most}
                else:
                    answer = {"error": f"there is no command {command}"}
            except Exception as error:  # whoever told it is told
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
