"""--frozen: keys of one moment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from skeyd.limits import DEFAULT_FREEZE_SECONDS, MAX_FREEZE_SECONDS, MIN_FREEZE_SECONDS

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Freeze:
    """What the client is to be asked for, as its own arguments."""

    frozen: bool = False
    freeze_seconds: float | None = None


def freeze_options(function: _F) -> _F:
    """Add --frozen and --freeze-budget; the function gets them as one Freeze, `freeze`."""

    @functools.wraps(function)
    def with_freeze(*arguments: Any, frozen: bool, freeze_budget: float | None, **others: Any) -> Any:
        if freeze_budget is not None and not frozen:
            raise click.UsageError("--freeze-budget goes with --frozen")
        return function(*arguments, freeze=Freeze(frozen, freeze_budget), **others)

    wrapped: Any = with_freeze
    for option in reversed(
        (
            click.option(
                "--frozen",
                is_flag=True,
                help="Keys of one moment: the VMM of an adopted VM stands still while they are read.",
            ),
            click.option(
                "--freeze-budget",
                type=click.FloatRange(MIN_FREEZE_SECONDS, MAX_FREEZE_SECONDS),
                metavar="SECONDS",
                help=f"For so long at most, else no keys are given. Default: {DEFAULT_FREEZE_SECONDS:g}.",
            ),
        )
    ):
        wrapped = option(wrapped)
    done: _F = wrapped
    return done


def shown(frozen_seconds: float | None) -> str:
    """Say for people of which moment keys are; nothing where they are live."""
    if frozen_seconds is None:
        return ""
    held = f", for which the VMM stood still for {frozen_seconds * 1000:.1f} ms" if frozen_seconds else ""
    return f"; all of one moment{held}"
