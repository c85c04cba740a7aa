"""The interpreter's lock, let go of in the middle of what takes long. For all but workers, which have one thread."""

from __future__ import annotations

import os

# A thread that computes is asked for the lock only when somebody has waited for 5 ms, and any of those who wait may get
# it: a health check beside eight streams that count or decode waited for several of them at each of its few steps.
# Where each lets go by itself after a piece of less than a millisecond, it waits for about a piece.
#
# Of what lets go (eight threads that count random keys, 2 CPUs with other work beside; p50 and p99 of who takes the
# lock three times, in ms; 124 to 156 and 408 to 706 where nothing does):
# - os.sched_yield: 3 to 4 and 17 to 19; a single thread is as fast as before. It lets go of the lock and of the CPU, so
#   whoever waits really gets them.
# - time.sleep(0): 2 to 4 and 15 to 30, but on Python 3.11 it sleeps for the timer's slack of some 50 microseconds: a
#   chunk of the most runs took 112 ms to decode in place of 58.
# - zlib.crc32 of the piece, as skeyd.storage_key.look_through has it, which computes it anyway: 50 to 55 and 92 to 117.
#   Often the thread has the lock again before another has woken up.
# - sys.setswitchinterval(0.0005): 22 to 24 and 75 to 142, and all threads of the process switch as often.


def give_way() -> None:
    """Let another thread have the interpreter's lock, if one waits for it; less than a microsecond where none does."""
    os.sched_yield()
