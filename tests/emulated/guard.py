"""Run a command that does not outlive its owner: ``python3 guard.py OWNER COMMAND…``, started by the process OWNER.

The command is killed when OWNER is gone, however it went, and when this process is told to terminate; this
process ends after it, with its status. A death signal set by OWNER itself would not do: the kernel sends that
when the *thread* that started the child ends. Here the only thread lives as long as the process, so the
command can have its death signal from this one, and this one watches OWNER through a pidfd. Standard library
only, started with -I -S.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the command of the command line; return its exit status, 128 + N when signal N ended it."""
    owner = int(sys.argv[1])
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        return 1
    guard = os.getpid()
    prctl = ctypes.CDLL(None).prctl

    def die_with_guard() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if os.getppid() != owner:  # it had gone, and its number was given to someone else
        return 1
    # Blocked until the command's killing is certain.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, stop)
    # Whatever the owner handed down is for the command. Safe before exec: there is one thread.
    command = subprocess.Popen(sys.argv[2:], close_fds=False, preexec_fn=die_with_guard)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        either = select.poll()
        either.register(owner_fd, select.POLLIN)
        either.register(os.pidfd_open(command.pid), select.POLLIN)
        either.poll()
    finally:
        command.kill()  # does nothing to a command that has ended
        status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
