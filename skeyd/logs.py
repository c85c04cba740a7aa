"""Logging: one JSON object a line in a service, colour on a terminal; the libraries' own lines take the same way.

Lines are made where they are logged and written by a thread of their own, so that no call waits for who reads them.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

import structlog

from skeyd import limits
from skeyd.line_writer import LineWriter
from skeyd.linux import write_in_vain

FORMATS: Final = ("auto", "json", "console")

LOST: Final = "log lines lost"
"""The event that stands where lines are missing; `lines` says how many."""

_TEXT_MAX: Final = 4_096
"""Characters of a text in a line. What is longer loses its middle: a traceback has its cause at its end."""
_SHORT_TEXT_MAX: Final = 128
"""The same in a line that is too long even so: one of few characters that JSON writes as twelve each."""


class _Handler(logging.Handler):
    # Makes a line of a record and hands it over.

    def __init__(self, fd: int, encoding: str, formatter: logging.Formatter, short: logging.Formatter) -> None:
        super().__init__()
        self._formatters = formatter, short
        self._encoding = encoding
        self._writer = LineWriter(fd, limits.MAX_LOG_BYTES, self._loss)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:
            # What it is logged for must go on; and standard error, where handleError() tells of it, may be stuck.
            self._writer.lose()
        else:
            self._writer.put(line)

    def flush(self) -> None:
        # By logging.shutdown() too, which Python calls at its end: whatever ends the process, nothing is forgotten.
        self._writer.flush(limits.LOG_FLUSH_SECONDS)

    def close(self) -> None:
        self._writer.close(0)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        line = b""
        for formatter in self._formatters:
            line = formatter.format(record).encode(self._encoding, "backslashreplace") + b"\n"
            if len(line) <= limits.MAX_LOG_LINE_BYTES:
                return line
        return line[: limits.MAX_LOG_LINE_BYTES - 1] + b"\n"

    def _loss(self, lines: int) -> bytes:
        level = logging.ERROR
        fields = {"name": "skeyd", "levelno": level, "levelname": "ERROR", "msg": LOST, "lines": lines}
        return self._line(logging.makeLogRecord(fields))


def configure(form: str) -> structlog.typing.FilteringBoundLogger:
    """Set up logging to standard error and return the logger. `form` is one of FORMATS.

    Exceptions that end the process or a thread are lines of the log, too.
    """
    on_terminal = sys.stderr.isatty()
    console = form == "console" or (form == "auto" and on_terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]

    def formatter(most: int) -> logging.Formatter:
        def cut(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
            return {name: _cut(value, most) for name, value in event.items()}

        if console:
            render: list[structlog.typing.Processor] = [cut, structlog.dev.ConsoleRenderer(colors=on_terminal)]
        else:
            render = [structlog.processors.format_exc_info, cut, structlog.processors.JSONRenderer()]
        return structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(["lines"])],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )

    write_in_vain(sys.stderr.fileno())  # grpc's C core has a few words of its own there, past all of this
    handler = _Handler(sys.stderr.fileno(), sys.stderr.encoding, formatter(_TEXT_MAX), formatter(_SHORT_TEXT_MAX))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger("skeyd")

    # Python's own hooks write to standard error by themselves, and so wait for its reader.
    def process_failed(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        log.critical("failed", exc_info=error)

    def thread_failed(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:  # which Python's own hook ignores, too
            log.error("thread failed", thread=failed.thread and failed.thread.name, exc_info=failed.exc_value)

    sys.excepthook = process_failed
    threading.excepthook = thread_failed
    return log


def flush() -> None:
    """Write out what waits, for LOG_FLUSH_SECONDS at most, before an exit that doesn't."""
    logging.shutdown()


def _cut(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= most else f"{value[: most // 2]} […] {value[-(most // 2) :]}"
    if isinstance(value, Mapping):
        return {name: _cut(one, most) for name, one in value.items()}
    return value
