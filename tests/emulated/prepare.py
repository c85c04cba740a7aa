"""Have the images that `make test` boots, before the tests: `python -m tests.emulated.prepare [SUITE ...]`.

Where this machine can't build it, say why and how it could, and let the tests be skipped; where the emulated host is
required (CI=true, SKEYD_REQUIRE_EMULATED=1), fail.
"""

import sys
from collections.abc import Sequence

from tests.emulated.fixtures import is_required, suites
from tests.emulated.image import BuildFailed, Image


def main(suites: Sequence[str]) -> int:
    """Build what is not cached; the exit status."""
    for suite in suites:
        image = Image(suite)
        try:
            reason = image.missing()
            if reason is None:
                image.build()
                continue
        except BuildFailed as error:
            reason = f"The emulated host {suite} could not be built: {error}"
        sys.stderr.write(f"{reason}\n")
        if is_required():
            return 1
        sys.stderr.write(f"The tests on {suite} will be skipped.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or suites()))
