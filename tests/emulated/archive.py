"""Under which names a Debian mirror has a suite that is whole.

A mirror serves a release by its codename and by an alias, "stable" for one. After a point release its caches may
have a new InRelease beside an old index for the one name, which apt refuses with "File has unexpected size", for days;
or the new index beside a pool that hasn't the packages yet, which it then fails to fetch; and for the other name all
that fits together (seen with trixie for s390x in November 2026, one after the other). The first is found out here; the
second is only known from trying.
"""

from __future__ import annotations

import logging
import re
import urllib.error
import urllib.request
from typing import Final

ALIASES: Final = ("oldoldstable", "oldstable", "stable", "testing")
SECONDS: Final = 30.0

_log = logging.getLogger(__name__)


def whole_suites(mirror: str, suite: str, architecture: str) -> list[str]:
    """Return the names to try, one after the other, at least one: the codename, and aliases of it that are whole.

    `mirror` ends with a slash. What can't be asked counts as whole under its codename: apt has the better message.
    """
    names = [suite]
    try:
        is_whole = _is_whole(mirror, suite, suite, architecture) is not False
        names += [alias for alias in ALIASES if _is_whole(mirror, alias, suite, architecture)]
        if not is_whole and len(names) > 1:
            _log.info("the mirror's %s is out of step; %s is the same release and whole", suite, names[1])
            names.remove(suite)
    except OSError as error:
        _log.info("the mirror can't be looked at: %s", error)
    return names


def _is_whole(mirror: str, name: str, codename: str, architecture: str) -> bool | None:
    # None: there is no such name, or it is another release's, or it says nothing of the index.
    index = f"main/binary-{architecture}/Packages.xz"
    try:
        with urllib.request.urlopen(f"{mirror}dists/{name}/InRelease", timeout=SECONDS) as answer:  # noqa: S310  apt's
            release = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        error.close()
        return None
    size = re.search(rf"^ [0-9a-f]{{64}} +(\d+) {re.escape(index)}$", release, re.MULTILINE)
    if size is None or not re.search(rf"^Codename: {re.escape(codename)}$", release, re.MULTILINE):
        return None
    request = urllib.request.Request(f"{mirror}dists/{name}/{index}", method="HEAD")  # noqa: S310  likewise
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310  likewise
            return int(answer.headers.get("Content-Length", -1)) == int(size[1])
    except urllib.error.HTTPError as error:
        error.close()
        return False
