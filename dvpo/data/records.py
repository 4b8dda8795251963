"""The one internal form of preference data: a prompt, the responses to it, and which of them is preferred."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvpo.files import atomic_write

Message = dict[str, str]
"""A chat message: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, slots=True)
class Response:
    """One answer. `policy` names who wrote it; `score` is a scalar judgement on the data's own scale."""

    text: str
    policy: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its responses.

    `preferences` holds index pairs (better, worse) into `responses`; a tie is in neither order.
    `origin` is "FILE:LINE" (or "HUB_ID@REV:ROW"), for messages to the user.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    preferences: tuple[tuple[int, int], ...]
    origin: str


def dump_examples(examples: Iterable[Example], path: Path) -> None:
    """Writes the internal form as JSON lines (one example a line)."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for example in examples:
            f.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


def load_examples(path: Path) -> list[Example]:
    """Reads what `dump_examples` wrote."""
    with open(path, encoding="utf-8") as f:
        return [_from_json(json.loads(line)) for line in f]


def _from_json(row: dict[str, Any]) -> Example:
    return Example(
        prompt=tuple(row["prompt"]),
        responses=tuple(Response(**r) for r in row["responses"]),
        preferences=tuple((better, worse) for better, worse in row["preferences"]),
        origin=row["origin"],
    )
