"""Generated files belong to the contract that is there, checked without the tools that make them."""

from __future__ import annotations

from pathlib import Path

from tools.make_proto import SOURCES, sources

ROOT = Path(__file__).resolve().parent.parent


def test_generated_code_was_made_from_these_proto_files() -> None:
    made_from = (ROOT / "skeyd" / "v1" / SOURCES).read_text()
    assert made_from == sources(), "run `make proto`"
