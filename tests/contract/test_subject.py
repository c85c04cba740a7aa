"""What the contract's tests are told when a kernel's keys are not as they should be."""

from __future__ import annotations

import pytest

from skeyd.worker.simulated import Generation
from tests.contract import kernels
from tests.contract.operations import HERE, Answer, Operation
from tests.contract.subject import MAX, Vm


class _Says:
    """A process in which GET finds certain keys."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys

    def play(self, *operations: Operation, where: str = HERE) -> list[Answer]:
        return [Answer(keys=self._keys) for _ in operations]


@pytest.mark.timeout(20)
def test_keys_that_are_wrong_are_told_in_few_words_however_many_there_are() -> None:
    wanted = bytes(MAX)
    Vm(_Says(wanted)).require_keys(0, wanted)
    wrong = bytearray(wanted)
    wrong[0x1000:0x1003] = b"\x10\x10\x20"
    with pytest.raises(AssertionError, match=r"^3 of 1048576 keys are wrong; from frame 0x1005 on ") as told:
        Vm(_Says(bytes(wrong))).require_keys(5, wanted)
    assert str(told.value).endswith("there are 10*2 20 00*253, not 00*256")


def test_each_generation_has_a_simulation_and_each_mark_has_kernels() -> None:
    marks = {name: mark for name, mark in vars(kernels).items() if isinstance(mark, pytest.MarkDecorator)}
    simulated = {
        name: [one.id for one in mark.args[1] if one.id.startswith("simulated-")] for name, mark in marks.items()
    }
    assert simulated["every_kernel"] == [f"simulated-{one.value}" for one in Generation]
    assert simulated["up_to_6_19"] == ["simulated-4.19"]
    assert simulated["since_7_0"] == ["simulated-7.0", "simulated-7.2"]
    # An empty one would have its tests skipped.
    assert all(mark.args[1] for mark in marks.values())
