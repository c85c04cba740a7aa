"""Under which name a Debian mirror has a suite that is whole.

A mirror serves a release by its codename and by an alias, "stable" for one, and after a point release its caches may
have a new InRelease beside an old index for the one name, and a pair that fits for the other (seen with trixie's
s390x index in November 2026: apt refuses the first with "File has unexpected size", for days). apt checks what is
downloaded in the end; here is only found out which name to give it.
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


def whole_suite(mirror: str, suite: str, architecture: str) -> str:
    """Return the codename, or an alias of it where only that is whole; the codename too where nothing is.

    `mirror` ends with a slash. What can't be asked counts as whole under its codename: apt has the better message.
    """
    try:
        if _is_whole(mirror, suite, suite, architecture) is not False:
            return suite
        for alias in ALIASES:
            if _is_whole(mirror, alias, suite, architecture):
                _log.info("the mirror's %s is out of step; %s is the same release and whole", suite, alias)
                return alias
    except OSError as error:
        _log.info("the mirror can't be looked at: %s", error)
    return suite


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
