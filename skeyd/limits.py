"""The limits and defaults of the front, each in one place. GetHost reports those that callers can meet."""

from __future__ import annotations

from typing import Final

MAX_CHUNK_KEYS: Final = 1_048_576
"""Most keys in a chunk: KVM_S390_SKEYS_MAX, and 1 MiB, a quarter of gRPC's default limit for a message."""

DEFAULT_CHUNK_KEYS: Final = 262_144
"""Keys in a chunk of GetSkeys where the request doesn't say: one slice."""

DEFAULT_SLICE_SECONDS: Final = 0.010
"""How long one ioctl may keep the kernel's lock, about, where a request doesn't say. The guest's own storage-key
instructions that need the host wait for it."""

MAX_SLICE_SECONDS: Final = 1.0
"""The same where a request asks for more. A slice is never over 262,144 keys, whatever it may take."""

DEFAULT_HOLD_SECONDS: Final = 1.0
"""How long one call may hold a thread of an adopted VM's VMM where AdoptVm doesn't say."""

MAX_HOLD_SECONDS: Final = 10.0
"""The most that it may say."""

DEFAULT_FREEZE_SECONDS: Final = 1.0
"""How long a VMM may stand still for a frozen read where the request doesn't say."""

MIN_FREEZE_SECONDS: Final = 0.001
"""The least that a request may say."""

MAX_FREEZE_SECONDS: Final = 10.0
"""The most. A guest that stands still for longer loses its connections, and its cluster takes it for dead."""

MAX_RANGES: Final = 16_384
"""Most ranges in a request; as many fit into some 300 KiB."""

MAX_RANGES_BYTES: Final = 512 * 1024
"""Most bytes in a message with ranges and without keys. A larger one is refused and not parsed, which would take some
20 times as much memory."""

MAX_REQUEST_BYTES: Final = 64 * 1024
"""Most bytes in a message with neither; some 10 KiB are the most that any has use for."""

MAX_VMS: Final = 1_024
"""Most VMs on a host; each is a process of some 10 MiB."""

MAX_CALLS: Final = 2_048
"""Most calls of all kinds at once, with those that are being refused; grpcio refuses one more by itself, and gives no
reason. More than all kinds may have together, so that none is refused for another's sake."""

MAX_WAITING: Final = 128
"""Most calls of a kind that wait for a thread; one more is refused. Streams of keys are a kind, short calls, health
checks, and watches with reflection."""

MAX_KEY_STREAMS: Final = 32
"""Most GetSkeys, SetSkeys, DigestSkeys and SummarizeSkeys at once; one more is refused. A VM gets another only while it
has fewer than are free: alone at most half of them."""

MAX_SHORT_CALLS: Final = 48
"""Most calls at once that are neither streams nor health checks; one more is refused. A VM gets another only while it
has fewer than are free: alone at most half of them. So does GetHost, as if it were one."""

IDLE_SESSIONS: Final = 64
"""Most connections to workers that are kept for the next short call."""

IDLE_SESSIONS_A_VM: Final = 4
"""The same of one VM."""

PROVEN_SECONDS: Final = 1.0
"""How long after a short call the next one on that connection takes it for granted that the worker answers."""

MAX_WATCHES: Final = 16
"""Most health watches and reflection streams at once; one more is refused."""

SPARE_THREADS: Final = 8
"""A running call holds a thread. Streams of keys, watches, health checks and all the rest have threads of their own, so
that no kind keeps another waiting; these are what a kind has beyond its limit, to refuse calls with."""

CHECK_THREADS: Final = 32
"""Threads for health checks, which take no time; but one whose request doesn't come holds a thread until it is cut."""

MAX_LISTS: Final = 4
"""Most ListVms and ListVmCandidates at once; one more is refused. Each asks up to 32 workers at a time, and each of
those holds a thread."""

CALL_THREADS: Final = MAX_SHORT_CALLS + SPARE_THREADS
"""Threads for all calls that are neither streams nor health checks."""

REQUEST_SECONDS: Final = 5.0
"""How long a client may take to send the first message of a call, which comes with the call from any honest one."""

CROWDED_REQUEST_SECONDS: Final = 1.0
"""The same while other calls of its kind wait for a thread."""

IDLE_SECONDS: Final = 60.0
"""How long a stream may wait for its client, to send its next message or to take one; then it is cut."""

KEEPALIVE_SECONDS: Final = 30.0
"""After so long without a word from its peer a daemon or a client asks whether it is there."""

KEEPALIVE_TIMEOUT_SECONDS: Final = 10.0
"""And after so long without an answer it takes the connection for lost: its calls end, UNAVAILABLE at a client."""

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Most bytes in a message from a client."""

RECEIVE_WINDOW_BYTES: Final = 262_144
"""Bytes that a client may send ahead of what a call has asked for: those of calls that wait for a thread are in
memory. A chunk of the default size."""

WORKER_START_SECONDS: Final = 45.0
"""How long a worker may take to make its VM."""

WORKER_HELLO_SECONDS: Final = 5.0
"""How long a worker may take to say who it is, and to answer a short call; a slice of another stream can be before it
in the queue."""

WORKER_ANSWER_SECONDS: Final = 60.0
"""How long a worker may take to answer for a slice."""

ROLL_BACK_STALL_SECONDS: Final = 30.0
"""How long a SetSkeys that failed waits for old keys of which none comes back, as while a debugger has the VM's
process. Its outcome is UNKNOWN then; the worker goes on trying, and GetVm's `last_write` tells what came of it."""

WORKER_END_SECONDS: Final = 30.0
"""How long a worker may take to end after it agreed to."""

DRAIN_SECONDS: Final = 10.0
"""How long running calls may go on after SIGTERM; then they are cut."""

MAX_LOG_BYTES: Final = 1024 * 1024
"""Most bytes of the log that wait to be read, some 5,000 lines. What is beyond is lost and counted."""

MAX_LOG_LINE_BYTES: Final = 16 * 1024
"""Most bytes in a line of the log. Of texts that are too long the middle is left out."""

LOG_FLUSH_SECONDS: Final = 2.0
"""How long the end, after DRAIN_SECONDS at most, may wait for who reads standard error."""
