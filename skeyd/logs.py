"""Logging: one JSON object a line in a service, colour on a terminal; the libraries' own lines take the same way."""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog

FORMATS: Final = ("auto", "json", "console")


def configure(form: str) -> structlog.typing.FilteringBoundLogger:
    """Set up logging to standard error and return the logger. `form` is one of FORMATS."""
    on_terminal = sys.stderr.isatty()
    console = form == "console" or (form == "auto" and on_terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        render: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(colors=on_terminal)]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger("skeyd")
    return log


def flush() -> None:
    """Write out what is still in buffers, before an exit that doesn't."""
    logging.shutdown()
    sys.stderr.flush()
