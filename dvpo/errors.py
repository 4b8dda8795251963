"""The two ways a command ends badly."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input or usage is wrong (exit code 2). The message is one sentence: what, where, and the way out."""


class StageError(RuntimeError):
    """The work itself failed (exit code 1). The message says what failed and where."""


@contextmanager
def in_row(origin: str) -> Iterator[None]:
    """While one row is read: an InputError is raised again with the row's file and line before it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
