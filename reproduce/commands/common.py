"""What the commands share: words for the user, tables, progress, and checks of what was typed."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpo.errors import InputError

if TYPE_CHECKING:
    from reproduce.pipeline import Stage

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet() -> None:
    """Silences the libraries' progress bars, warnings and logs; call it before they are imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def say(text: str) -> None:
    """A line for the user on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """One JSON document on standard output, in ASCII: any terminal can show it. NaN and infinity raise ValueError."""
    print(json.dumps(document, allow_nan=False, indent=1))


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Aligned plain text; the columns numbered in `left` are flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(aligned, lines))


def by_text(said: Iterable[tuple[str, str]]) -> list[str]:
    """Of (name, text), lines "names: text": each text once, with all the names that it is said of."""
    names: dict[str, list[str]] = {}
    for name, text in said:
        names.setdefault(text, []).append(name)
    return [f"{', '.join(named)}: {text}" for text, named in names.items()]


def require_checkpoint(name: str) -> str:
    """`name`, if a folder is there or it is spelt like a hub id (owner/name)."""
    if Path(name).is_dir() or (not Path(name).exists() and _HUB_ID.fullmatch(name) and not Path(name).parent.is_dir()):
        return name
    what = "is a file, not a folder" if Path(name).exists() else "no such folder"
    raise InputError(f"{name}: {what}; give a checkpoint folder or a hub id (owner/name)")


class Progress:
    """The `Report` of a run, on standard error: one updating line on a terminal, else a line per finished stage."""

    def __init__(self, total: int):
        self.total, self.finished, self.reused = total, 0, 0
        self.running: list[str] = []
        self.terminal = sys.stderr.isatty()

    def __call__(self, stage: "Stage", event: str, seconds: float) -> None:
        """Takes (stage, "started" | "done" | "reused", seconds)."""
        if event == "reused":
            self.finished += 1
            self.reused += 1
        else:
            self._say_reused()
        if event == "started":
            self.running.append(stage.id)
        elif event == "done":
            self.running.remove(stage.id)
            self.finished += 1
            if not self.terminal:
                say(f"{self._count()} {stage.id} done in {seconds:.0f} s")
        if self.terminal:
            width = max(20, os.get_terminal_size(sys.stderr.fileno()).columns - 1)  # some terminals report 0
            line = f"{self._count()} {', '.join(self.running)}"
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the output: clears the updating line, and says what no line has said yet."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._say_reused()

    def _count(self) -> str:
        return f"[{self.finished}/{self.total}]"

    def _say_reused(self) -> None:
        if self.reused and not self.terminal:
            say(f"{self._count()} {self.reused} {'stage was' if self.reused == 1 else 'stages were'} done before")
        self.reused = 0
