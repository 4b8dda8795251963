"""A request to stop: a training ends at its next safe step, with a checkpoint, instead of where the signal met it."""

import signal
from typing import Any

from dvpo.errors import StageError

_asked = False


class Stopped(StageError):
    """A training ended early because it was asked to; its checkpoint is whole."""


def listen() -> None:
    """Takes SIGTERM as a request to stop; a second one ends the process at once."""
    signal.signal(signal.SIGTERM, _take)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked


def _take(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
