"""Giving way: another thread gets the interpreter's lock that would have waited for it."""

from __future__ import annotations

import os
import sys
import threading

from skeyd.turns import give_way

ENDLESS = 1000.0
"""Seconds after which the interpreter by itself has a thread let go of the lock: never in a test."""

TIMES = 1_000_000
"""One is enough where another thread is quick to wake up; where nothing is let go of, no number is."""


def test_another_thread_that_waits_for_the_lock_gets_it() -> None:
    steps, stop = [0], threading.Event()

    def run() -> None:
        while not stop.is_set():
            steps[0] += 1
            os.sched_yield()

    other, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(ENDLESS)
    try:
        other.start()
        before = steps[0]
        for _ in range(TIMES):
            give_way()
            if steps[0] >= before + 2:
                break
        found = steps[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    assert found >= before + 2
