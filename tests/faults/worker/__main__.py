"""A real worker with points in it: what the front of these tests starts in place of skeyd/worker/__main__.py.

Functions of skeyd are wrapped; what is wrapped is the product, unchanged. The points, each `.before` and `.after`:

    set.get set.push set.write set.set set.read_back set.repair set.read_again    one slice of a SetSkeys
    rollback.pop rollback.read rollback.get rollback.set rollback.read_back rollback.repair rollback.read_again
    begin commit abandon step                                                     of Transactions
    answer.OP (answer.hello, answer.set, ...)                                     the packet with the answer
    other.get other.set other.read_back                                           ioctls of other requests, as a SetSkey
    keyop.iske keyop.sske keyop.rrbe                                              KVM_S390_KEYOP
"""

import os
import sys


def _main() -> int:
    # Without site-packages neither skeyd nor the tests are on the path.
    here = os.path.abspath(__file__)  # noqa: PTH100
    for _ in range(4):
        here = os.path.dirname(here)  # noqa: PTH120
    sys.path.append(here)

    from skeyd.worker import process
    from tests.faults import worker_points

    if sys.argv[1:] == ["probe"]:
        return process.report_host()
    worker_points.install(int(sys.argv[2]))
    return process.serve_vm(int(sys.argv[2]))


if __name__ == "__main__":
    sys.exit(_main())
