"""Structured logs on standard error: JSON lines, or readable ones on a terminal. Never a text or a token id."""

import logging
import sys
import traceback
from typing import Any

import structlog


def configure() -> None:
    """Sets the process's log format; the web server's own messages take it too."""
    shared: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper("iso")]
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[*shared, structlog.processors.dict_tracebacks, renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.getLogger("uvicorn").handlers = [handler]
    logging.getLogger("uvicorn").propagate = False


def frames_of(error: BaseException) -> list[str]:
    """Where an error was raised, without its own message, which may quote what was sent."""
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


def logger() -> Any:
    """The server's logger."""
    return structlog.get_logger("server")
