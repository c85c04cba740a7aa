"""Where packages can't be fetched, an image is built under the next name that the mirror has the suite by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated import image, qemu
from tests.emulated.image import BUILD_LOG, BuildFailed, Image

NOT_FETCHED = "E: Failed to fetch http://mirror/debian/pool/libc6_2.41_s390x.deb  404  Not Found"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a mirror with two names of a suite, and for a builder a program that fails with what it is told to say."""
    here = tmp_path / "tests" / "emulated"
    here.mkdir(parents=True)
    (here / "guard.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "directory, mirror, name = sys.argv[-3:]\n"
        f"assert os.listdir(directory) == ['{BUILD_LOG}'], 'left of the one before'\n"
        "Path(directory, name).touch()\n"
        "sys.exit(os.environ['SAYS_' + name.upper()] or 0)\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image, "HERE", here)
    monkeypatch.setattr(image, "_missing_to_build", lambda: None)
    monkeypatch.setattr(image, "_mirror", lambda: "http://mirror/debian/")
    monkeypatch.setattr(image, "whole_suites", lambda *_: ["trixie", "stable"])
    monkeypatch.setattr(qemu, "needs_newer", lambda _: False)


def built(monkeypatch: pytest.MonkeyPatch, **says: str) -> list[str]:
    """Build; return what the finished directory has."""
    for name, said in says.items():
        monkeypatch.setenv(f"SAYS_{name.upper()}", said)
    return sorted(path.name for path in Image("trixie").build().iterdir())


@pytest.mark.usefixtures("mirror")
def test_packages_that_the_mirror_has_not_are_fetched_under_the_next_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(monkeypatch, trixie=NOT_FETCHED, stable="") == [BUILD_LOG, "stable"]


@pytest.mark.usefixtures("mirror")
def test_the_first_name_will_do_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(monkeypatch, trixie="", stable=NOT_FETCHED) == [BUILD_LOG, "trixie"]


@pytest.mark.usefixtures("mirror")
def test_another_fault_is_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildFailed, match=r"building trixie failed:\nthe kernel has changed"):
        built(monkeypatch, trixie="the kernel has changed", stable="")


@pytest.mark.usefixtures("mirror")
def test_where_no_name_has_all_the_last_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildFailed, match=r"libc6_2\.42"):
        built(monkeypatch, trixie=NOT_FETCHED, stable=NOT_FETCHED.replace("2.41", "2.42"))
