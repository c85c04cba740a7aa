"""Make the pages of docs/ that repeat what the code knows, or with --check say which are stale."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

from skeyd import limits
from skeyd.errors import Reason
from skeyd.rpc.status import DOMAIN, RETRY_SECONDS, STATUS

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "<!-- Made by `make docs`; edit the code that it is made from. -->\n\n"


def errors() -> str:
    """List reasons and statuses, from skeyd/errors.py and skeyd/rpc/status.py."""
    lines = [
        MADE + "# Errors\n",
        "Every error that skeyd itself raises has a gRPC status and, in its details, a `google.rpc.ErrorInfo` with",
        f"domain `{DOMAIN}`, one of these reasons, and metadata: the gfn, the VM, the remedy. Reasons are stable;",
        "messages are not. Errors that pass by themselves also carry `google.rpc.RetryInfo`.\n",
        "A failed SetSkeys says in its metadata what became of the keys, as `outcome`: `UNCHANGED`; `ROLLED_BACK`, the old",
        "keys are set again and verified; `DIRTY`, the kernel refused some of the old keys, and `dirty` has the first of",
        "these frames (GetVm's `last_write` has 256 ranges, the last of which reaches to the end of all, where there are",
        "more); `KEPT`, as the request wanted, and `next_gfn`, `keys_set` and `crc32`",
        "say up to where, and `uncertain` which slice the kernel stopped in, if it did; `UNKNOWN`, since the worker is",
        f"gone or can't be asked, or no old key came back for {limits.ROLL_BACK_STALL_SECONDS:g} s: it goes on trying, and",
        "`last_write` has the end. `enabled` says that the guest uses storage keys since. A SetSkeys that there is no room",
        "for is refused before it is read, and says nothing of keys: nothing was done.\n",
        "| reason | status | means | try again after |",
        "| --- | --- | --- | --- |",
    ]
    for reason in Reason:
        again = f"{RETRY_SECONDS[reason]} s" if reason in RETRY_SECONDS else ""
        lines.append(f"| `{reason.name}` | {STATUS[reason].name} | {reason.value} | {again} |")
    lines += [
        "",
        "A few errors come from gRPC itself and have no details: `UNIMPLEMENTED` for a method that there is not,",
        "`RESOURCE_EXHAUSTED` for a message or a number of calls beyond the [limits](limits.md), `CANCELLED` for a stream",
        "that its client let stand still for too long (a SetSkeys is then rolled back as ever), and the",
        "health service's `NOT_FOUND`. Anything else is `INTERNAL` without details: a mistake in skeyd, with a traceback",
        "in the daemon's log.",
    ]
    return "\n".join(lines) + "\n"


def bounds() -> str:
    """List limits, from skeyd/limits.py."""
    lines = [MADE + "# Limits and defaults\n", "| name | value | what it bounds |", "| --- | --- | --- |"]
    body = ast.parse(Path(limits.__file__).read_text()).body
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                raise TypeError(f"{node.target.id} has no docstring")
            name = node.target.id
            what = " ".join(str(after.value.value).split())
            value = getattr(limits, name)
            lines.append(f"| `{name}` | {value:,} | {what} |")
    return "\n".join(lines) + "\n"


PAGES = {"errors.md": errors, "limits.md": bounds}


def main() -> int:
    """Write the pages, or check them."""
    stale = []
    for name, make in PAGES.items():
        page = DOCS / name
        if sys.argv[1:] == ["--check"]:
            if not page.exists() or page.read_text() != make():
                stale.append(name)
        else:
            page.write_text(make())
    if stale:
        print(f"stale, run `make docs`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
