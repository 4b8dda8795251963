"""Reads preference data and prompts from files, folders and the hub into the one internal form.

Rows are recognised by their fields: pairs (`prompt, chosen, rejected`), groups (`prompt, completions`), transcripts
(`chosen, rejected` as "Human: ... Assistant: ..." text), bare prompts, and what this package wrote itself. Nothing is
dropped silently: what cannot be used is counted in `Notes`, and malformed rows stop the reading with their places.
"""

import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

from dvpo.data.records import Example, Message, Response
from dvpo.data.splits import brief, data_files, hub_rows, is_hub_id, listed
from dvpo.data.splits import prompt_key as prompt_key
from dvpo.errors import InputError
from dvpo.files import sha256_file, sha256_json

_ROLES = ("system", "user", "assistant")
_Prompt = tuple[Message, ...]
_SURROGATE = re.compile("[\ud800-\udfff]")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass
class Notes:
    """What was read and what was left out. `rows` counts what stood in the source, the next three what was kept."""

    rows: int = 0
    examples: int = 0
    responses: int = 0
    preferences: int = 0
    ties: int = 0
    contradictions: int = 0
    empty_responses: int = 0
    examples_without_responses: int = 0
    multi_turn_difference: int = 0
    duplicates: int = 0

    def asdict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The counts for a reader; those of unusual things only where there are any."""
        unusual = (
            (self.ties, "ties kept as responses, without a preference"),
            (self.contradictions, "preferences that the scores contradict"),
            (self.empty_responses, "empty responses dropped"),
            (self.examples_without_responses, "examples dropped because no response was left"),
            (self.multi_turn_difference, "rows dropped because chosen and rejected differ in more than one turn"),
            (self.duplicates, "exact duplicates of earlier examples dropped"),
        )
        head = f"{self.rows} rows: {self.examples} examples, {self.responses} responses, {self.preferences} preferences"
        return [head, *(f"{count} {what}" for count, what in unusual if count)]


@dataclass
class Dataset:
    """What `read` gives. `digest` identifies the source's bytes (for the hub: its id, revision and split)."""

    examples: list[Example]
    notes: Notes
    digest: str


class _Malformed(Exception):
    """Why one row cannot be read."""


def read(source: str | Path, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Reads a .jsonl, .jsonl.gz or .parquet file, a folder of such files, or a hub data set `owner/name@REV`.

    `split` chooses among a folder's files (those whose name contains it) or the hub's splits; `limit` reads only the
    first so many rows. Raises `InputError` where the source is missing, empty or has malformed rows.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit on the rows of {source} is {limit}; give at least 1, or none")
    path = Path(source)
    if not str(source):
        raise InputError("the data's name is empty; give a file or folder, or a hub id as owner/name@REV")
    if path.exists():
        files = data_files(path, split)
        rows = chain.from_iterable((_parquet_rows if f.suffix == ".parquet" else _jsonl_rows)(f) for f in files)
        try:
            names = {file.name: sha256_file(file) for file in files}
            return _collect(source, rows, limit, names[files[0].name] if len(files) == 1 else sha256_json(names))
        except OSError as error:
            raise InputError(f"{source} cannot be read ({error.strerror or error}); mend the file") from error
    if is_hub_id(name := str(source)):
        numbered = ((f"{name}:{number}", row) for number, row in enumerate(hub_rows(name, split), 1))
        return _collect(name, numbered, limit, sha256_json([name, split]))
    raise InputError(f"{source} is no file or folder; give one, or a hub id as owner/name@REV (40-hex commit or tag)")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _decoded(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a truncated or broken gzip file ({brief(error)}); fetch it again") from error


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return _Malformed(f"the line is not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # not UTF-8, a number too long, nesting too deep
        return _Malformed(f"the line is not usable ({brief(error)})")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=64)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield f"{path.name}:row {number}", row
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet ({brief(error)}); write it again") from error


def _complaint(malformed: list[tuple[str, str]]) -> str:
    """One sentence on the malformed rows: why the first is, and where the next few stand."""
    (origin, reason), *others = malformed
    if not others:
        return f"{origin}: {reason}; mend or remove it"
    places = [other.removeprefix(origin.rpartition(":")[0] + ":") for other, _ in others[:4]]
    where = ("lines " if places[0].isdigit() else "") + ", ".join(places) + (", ..." if len(others) > 4 else "")
    more = f"{len(others)} more malformed row{'s' if len(others) > 1 else ''}"
    return f"{origin}: {reason} (and {more}: {where}); mend or remove them"


def _collect(source: str | Path, rows: Iterable[tuple[str, Any]], limit: int | None, digest: str) -> Dataset:
    examples: list[Example] = []
    malformed: list[tuple[str, str]] = []
    total, seen, kind = Counter[str](), set[str](), ""
    for origin, value in islice(rows, limit):
        total["rows"] += 1
        counts = Counter[str]()
        try:
            row = _object(value)
            kind = kind or _kind(row)
            example = _example(row, kind, origin, counts)
        except _Malformed as error:
            malformed.append((origin, str(error)))
            continue
        if example is not None:
            key = sha256_json([example.prompt, [astuple(r) for r in example.responses], example.preferences])
            if key in seen:
                total["duplicates"] += 1
                continue
            seen.add(key)
            examples.append(example)
            counts.update(examples=1, responses=len(example.responses), preferences=len(example.preferences))
        total += counts
    if malformed:
        raise InputError(_complaint(malformed))
    if not total["rows"]:
        raise InputError(f"{source} has no rows; give one with data")
    return Dataset(examples, Notes(**total), digest)


def _object(value: Any, name: str = "the row") -> dict[str, Any]:
    if isinstance(value, _Malformed):
        raise value
    if not isinstance(value, dict):
        raise _Malformed(f"{name} is not an object with named fields")
    # Tables write an absent field as null.
    return {name: item for name, item in value.items() if item is not None}


def _kind(row: dict[str, Any]) -> str:
    compared = [row[name] for name in ("chosen", "rejected") if name in row]
    if "completions" in row:
        if compared:
            raise _Malformed('the row has both "completions" and "chosen" or "rejected"')
        return "group"
    if compared:
        return "transcript" if "prompt" not in row and isinstance(compared[0], str) else "pair"
    if {"responses", "preferences", "origin"} <= row.keys():
        return "example"
    if "response" in row:
        raise _Malformed('field "response" stands outside "completions"')
    if "prompt" in row:
        return "prompt"
    raise _Malformed(f"the fields ({listed(sorted(row))[:100]}) fit no known format")


def _example(row: dict[str, Any], kind: str, origin: str, counts: Counter[str]) -> Example | None:
    # A row that only lacks fields is read as the file's own kind, so that the message names the missing field.
    lacking = {"pair": ("transcript", "prompt"), "group": ("prompt",)}.get(kind, ())
    own = _kind(row)
    if own != kind and own not in lacking:
        raise _Malformed(f"a {own} row stands among {kind} rows")
    if kind == "prompt":
        return Example(_prompt(row), (), (), origin)
    if kind == "example":
        return _own(row)
    if kind == "group":
        prompt = _prompt(row, "instruction" if "instruction" in row and "prompt" not in row else "prompt")
        responses = _completions(row)
        scored = [(r.score, i) for i, r in enumerate(responses) if r.score is not None]
        pairs = [(i, j) if a >= b else (j, i) for (a, i), (b, j) in combinations(scored, 2)]
        return _judged(prompt, responses, pairs, origin, counts)
    return _compared(row, kind, origin, counts)


def _own(row: dict[str, Any]) -> Example:
    """A row that `dvpo.data.records.dump_examples` wrote; it names its own origin."""
    responses = _completions(row, "responses", "text")
    preferences = []
    for number, pair in enumerate(_checked(row["preferences"], list, "preferences")):
        places = _checked(pair, list, f"preferences[{number}]")
        if len(places) != 2 or not all(type(i) is int and 0 <= i < len(responses) for i in places):
            raise _Malformed(f'field "preferences[{number}]" is not two places in "responses"')
        preferences.append((places[0], places[1]))
    return Example(_prompt(row), tuple(responses), tuple(preferences), _text(row["origin"], "origin"))


def _judged(
    prompt: _Prompt, responses: list[Response], pairs: Iterable[tuple[int, int]], origin: str, counts: Counter[str]
) -> Example | None:
    """The example without its empty responses. `pairs` (better, worse) may hold ties, which are only counted."""
    kept = [i for i, response in enumerate(responses) if response.text.strip()]
    counts["empty_responses"] += len(responses) - len(kept)
    if not kept:
        counts["examples_without_responses"] += 1
        return None
    place = {old: new for new, old in enumerate(kept)}
    preferences = []
    for i, j in pairs:
        if i in place and j in place:
            better, worse = responses[i], responses[j]
            if better.text == worse.text or (better.score is not None and better.score == worse.score):
                counts["ties"] += 1
                continue
            if better.score is not None and worse.score is not None and better.score < worse.score:
                counts["contradictions"] += 1
            preferences.append((place[i], place[j]))
    return Example(prompt, tuple(responses[i] for i in kept), tuple(preferences), origin)


def _compared(row: dict[str, Any], kind: str, origin: str, counts: Counter[str]) -> Example | None:
    """A pair or transcript: what both conversations share is the prompt, the rest of each must be one reply."""
    if kind == "transcript":
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    else:
        prompt = _prompt(row) if "prompt" in row else ()
        chosen, rejected = _conversation(row, "chosen", prompt), _conversation(row, "rejected", prompt)
    # The last message is always the reply, even where both are the same.
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if max(len(chosen), len(rejected)) > shared + 1:
        counts["multi_turn_difference"] += 1
        return None
    metadata = row.get("metadata")
    fields = {**row, **{f"metadata.{k}": v for k, v in (metadata if isinstance(metadata, dict) else {}).items()}}
    responses = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        score = _score(fields, f"score_{name}", f"metadata.score_{name}", f"{name}_score")
        policy = _policy(fields, f"{name}_model", f"{name}_policy")
        responses.append(Response(messages[-1]["content"], policy, score))
    return _judged(_usable(chosen[:shared], "prompt"), responses, [(0, 1)], origin, counts)


def _conversation(row: dict[str, Any], name: str, prompt: _Prompt) -> _Prompt:
    """The prompt followed by the reply; the field holds the reply alone (text or messages) or the whole."""
    messages = _messages(row.get(name), name, "assistant")
    if not messages or messages[-1]["role"] != "assistant":
        raise _Malformed(f'field "{name}" does not end with a message of the assistant')
    if messages[: len(prompt)] == prompt:
        return messages
    if messages[0]["role"] != "assistant":
        raise _Malformed(f'field "{name}" does not begin with the prompt')
    return (*prompt, *messages)


def _turns(row: dict[str, Any], name: str) -> _Prompt:
    """The messages of a transcript. A marker of the role that is speaking already is part of its text."""
    text = _text(row.get(name), name)
    start, *parts = _TURN.split("\n\n" + text.lstrip())
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{speaker}:{said}".strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    if start or not turns or turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        raise _Malformed(f'field "{name}" is no transcript from "Human:" to a last "Assistant:"')
    return tuple(turns)


def _completions(row: dict[str, Any], field: str = "completions", text_name: str = "response") -> list[Response]:
    found = []
    for number, item in enumerate(_checked(row.get(field), list, field)):
        name = f"{field}[{number}]."
        fields = {name + key: value for key, value in _object(item, name[:-1]).items()}
        text = _text(fields.get(f"{name}{text_name}"), f"{name}{text_name}")
        policy = _policy(fields, f"{name}model", f"{name}policy")
        found.append(Response(text, policy, _score(fields, f"{name}overall_score", f"{name}score")))
    return found


def _prompt(row: dict[str, Any], name: str = "prompt") -> _Prompt:
    return _usable(_messages(row.get(name), name, "user"), name)


def _usable(prompt: _Prompt, name: str) -> _Prompt:
    if not any(message["content"].strip() for message in prompt):
        raise _Malformed(f"the {name} is missing or empty")
    if prompt[-1]["role"] == "assistant":
        raise _Malformed(f"the {name} ends with a message of the assistant")
    return prompt


def _messages(value: Any, name: str, speaker: str) -> _Prompt:
    """A list of messages, or a text said by `speaker`."""
    if isinstance(value, str):
        return ({"role": speaker, "content": _text(value, name)},)
    messages = []
    for number, item in enumerate(_checked(value, list, name)):
        message = _object(item, place := f"{name}[{number}]")
        if (role := message.get("role")) not in _ROLES:
            raise _Malformed(f'field "{place}.role" is {role!r:.40}, not one of {listed(_ROLES)}')
        messages.append({"role": role, "content": _text(message.get("content"), f"{place}.content")})
    return tuple(messages)


def _checked(value: Any, wanted: type, name: str) -> Any:
    if not isinstance(value, wanted):
        wrong = "missing" if value is None else "not text" if wanted is str else "not a list"
        raise _Malformed(f'field "{name}" is {wrong}')
    return value


def _text(value: Any, name: str) -> str:
    text: str = _checked(value, str, name)
    # JSON can spell half a surrogate pair, which no tokenizer or file can take.
    if not text.isascii() and _SURROGATE.search(text):
        raise _Malformed(f'field "{name}" has broken Unicode (half a surrogate pair)')
    return text


def _policy(row: dict[str, Any], *names: str) -> str | None:
    return next((_text(row[name], name) for name in names if name in row), None) or None


def _score(row: dict[str, Any], *names: str) -> float | None:
    for name in names:
        if (value := row.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise _Malformed(f'field "{name}" is not a finite number')
            return float(value)
    return None
