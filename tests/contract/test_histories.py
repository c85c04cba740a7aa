"""What a random history comes to, and which of them count. What they are worth is in test_histories_worth.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import strategies as st

from tests.contract import histories
from tests.contract.histories import FEWEST, History, Tally, try_histories
from tests.contract.operations import Create, Delete, Get, Set, Touch
from tests.contract.subject import SEGMENT, slots

ROOT: Final = Path(__file__).parents[2]
LAYOUTS: Final = (slots((0, 1)), slots((0, 1), (3, 2)))


def test_a_step_on_a_vm_that_is_not_there_makes_it_and_every_key_is_read_before_a_vm_goes() -> None:
    history = History(LAYOUTS, (Delete(1), Touch(3, False, 1), Create(LAYOUTS[1], 1), Set(0, b"\x30"), Delete(1)))
    ends = [Get(0, SEGMENT, 1), Get(3 * SEGMENT, 2 * SEGMENT, 1), Delete(1)]
    assert history.operations() == [
        *(Create(LAYOUTS[1], 1), Touch(3, False, 1), *ends),
        *(Create(LAYOUTS[1], 1), Create(LAYOUTS[0], 0), Set(0, b"\x30"), *ends),
        *(Get(0, SEGMENT, 0), Delete(0)),
    ]


@pytest.mark.parametrize(("gfn", "frames"), [(0, 512), (300, 212), (512, 0), (768, 256), (1023, 1)])
def test_there_is_room_up_to_the_first_frame_in_no_slot(gfn: int, frames: int) -> None:
    assert histories.room(slots((1, 1), (3, 1), (0, 1)), gfn) == frames


def test_a_history_counts_once_and_a_short_one_never() -> None:
    tally = Tally()
    steps = tuple(Set(gfn, b"\x30") for gfn in range(FEWEST))
    assert not tally.add(History(LAYOUTS, ()))
    assert not tally.add(History(LAYOUTS, steps[1:]))
    assert tally.add(History(LAYOUTS, steps))
    assert not tally.add(History(LAYOUTS, steps))
    # A layout that no step meets makes no other history of it.
    assert not tally.add(History(LAYOUTS[:1], steps))
    assert tally.add(History(LAYOUTS, steps[::-1]))
    assert tally.count == 2


def test_fewer_histories_than_were_asked_for_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # There are three that count, one too short, and each is drawn in two ways.
    few = st.integers(0, 7).map(lambda n: History(LAYOUTS, (Delete(0),) * 2 + (Set(0, b"\x30"),) * (n // 2 + 1)))
    monkeypatch.setattr(histories, "histories", lambda generation: few)
    assert try_histories("7.2", 3, lambda history: None).count == 3
    with pytest.raises(AssertionError, match="only 3 histories of 4 steps and more, of 4 asked for"):
        try_histories("7.2", 4, lambda history: None)


def test_no_run_of_ci_draws_the_histories_of_another() -> None:
    code = "from tests.contract.histories import SETTINGS; print(SETTINGS.derandomize)"
    environment = {**os.environ, "CI": "true"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    assert done.stdout.strip() == b"False"


def test_the_page_says_how_many_histories_the_full_run_has() -> None:
    asked = re.search(r"SKEYD_HISTORIES=(\d+)", (ROOT / "Makefile").read_text())
    assert asked
    count = int(asked[1])
    said = f"{count:,} histories in one process and {max(4, count // 8)} in new ones"
    assert said in " ".join((ROOT / "docs/kernel.md").read_text().split())
