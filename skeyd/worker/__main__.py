"""Start a worker: `python -I -S skeyd/worker/__main__.py vm DIRECTORY_FD`, `… probe`, or `… candidates`.

-I and -S keep the environment, the user's site and site-packages out: a worker loads skeyd and the standard library,
is small, and is ready in some 30 ms.
"""

import os
import sys

if __name__ == "__main__":
    # Without site-packages the package is not on the path; it lies two folders up.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100,PTH120

    from skeyd.worker import process

    if sys.argv[1:] == ["probe"]:
        status = process.report_host()
    elif sys.argv[1:] == ["candidates"]:
        status = process.report_candidates()
    elif sys.argv[1:2] == ["vm"] and len(sys.argv) == 3:
        status = process.serve_vm(int(sys.argv[2]))
    else:
        sys.exit(f"usage: {sys.argv[0]} vm DIRECTORY_FD | probe | candidates")
    sys.exit(status)
