"""The questions of a benchmark, from files or the hub, checked before anything is asked.

A folder holds one file NAME*.jsonl of questions for each benchmark, NAME being mt_bench, arena_hard or alpaca_eval
("answers", "baseline" or "reference" in a file's name says that it holds no questions). A row is

    {"id": ..., "turns": [text, ...], "category": text, "reference": [text, ...]}

where "question_id", "prompt_id" or "uid" may stand for "id"; "prompt" or "instruction" (one text, or a list) for
"turns"; "cluster" or "dataset" for "category"; a missing id is the row's number. Only "turns" is needed, and for
MT-Bench "category". A folder's mt_bench*reference*.jsonl {"question_id", "choices": [{"turns": [...]}]} adds reference
answers, as the benchmark itself ships them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvpo.data.records import Example, Message
from dvpo.data.splits import hub_rows, is_hub_id, listed, prompt_key
from dvpo.errors import InputError
from dvpo.files import sha256_json

MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_NAMES = {"mt_bench": "MT-Bench", "arena_hard": "Arena-Hard v0.1", "alpaca_eval": "AlpacaEval 2"}
_SIZES = {"mt_bench": 80, "arena_hard": 500, "alpaca_eval": 805}
_NOT_QUESTIONS = ("answer", "baseline", "reference")


@dataclass(frozen=True)
class Question:
    """What a policy is asked, turn after turn.

    reference: a right answer to each turn; none, or an empty one, where there is none.
    context: the messages before the first turn, where there are any.
    numbered: whether the id is only the row's number.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] = ()
    context: tuple[Message, ...] = ()
    numbered: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Questions, in the source's order. `size` is the number of those of the whole benchmark."""

    name: str
    questions: tuple[Question, ...]
    size: int

    @property
    def part(self) -> str | None:
        """None for the whole benchmark, else what is there of it ("12 of 80 questions")."""
        n = len(self.questions)
        return None if n == self.size else f"{n} of {self.size} questions"

    @property
    def sha256(self) -> str:
        """Digest of the questions, whatever file they came from."""
        return sha256_json([[q.id, q.turns, q.category, q.reference, q.context] for q in self.questions])


def load(benchmark: str, source: str | Path, most: int | None = None) -> Benchmark:
    """Reads the questions of mt_bench, arena_hard or alpaca_eval from a folder, a .jsonl file or owner/name@REV.

    Args:
        most: at most so many questions, taken at even distances, so that every category has its share.

    Raises:
        InputError: nothing there, malformed rows, two questions of one id, or rows that are not of this benchmark.
    """
    path = Path(source)
    if path.exists():
        rows = _rows(_questions_file(benchmark, path) if path.is_dir() else path)
    elif is_hub_id(str(source)):
        rows = ((f"{source}:{i}", row) for i, row in enumerate(hub_rows(str(source), None), 1))
    else:
        raise InputError(
            f"{source} is no file or folder; give one, or a hub id as owner/name@REV (40-hex commit or tag)"
        )
    questions = tuple(_question(row, origin, str(i)) for i, (origin, row) in enumerate(rows, 1))
    if path.is_dir():
        questions = _with_references(questions, sorted(path.glob(f"{benchmark}*reference*.jsonl")))
    _check(benchmark, questions, source)
    return Benchmark(_NAMES[benchmark], evenly(questions, most), _SIZES[benchmark])


def prompts_of(examples: Sequence[Example], name: str, most: int | None = None) -> Benchmark:
    """The prompts of preference data as questions, each once, known by their text's digest."""
    by_key = {prompt_key(e.prompt): e.prompt for e in examples}
    questions = tuple(
        Question(key[:16], (prompt[-1]["content"],), context=tuple(prompt[:-1])) for key, prompt in by_key.items()
    )
    return Benchmark(name, evenly(questions, most), len(questions))


def evenly(questions: tuple[Question, ...], most: int | None) -> tuple[Question, ...]:
    """At most `most` of them, at even distances."""
    n = len(questions)
    return questions if most is None or most >= n else tuple(questions[i * n // most] for i in range(most))


def _questions_file(benchmark: str, folder: Path) -> Path:
    found = [p for p in sorted(folder.glob(f"{benchmark}*.jsonl")) if not any(w in p.name for w in _NOT_QUESTIONS)]
    if len(found) != 1:
        raise InputError(
            f"{folder} has {listed(p.name for p in found)} for the questions of {_NAMES[benchmark]}; put one file "
            f"{benchmark}*.jsonl there"
        )
    return found[0]


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .jsonl file, each with its place "FILE:LINE". Raises InputError where one is no object."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the file cannot be read ({error}); give a .jsonl file") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair
            except ValueError as error:
                raise InputError(f"{path.name}:{number}: the line is not usable JSON ({error}); mend it") from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name}:{number}: the line is not an object with named fields; mend it")
            yield f"{path.name}:{number}", row


def _question(row: dict[str, Any], origin: str, number: str) -> Question:
    name = _first(row, "id", "question_id", "prompt_id", "uid")
    category = _first(row, "category", "cluster", "dataset")
    if "cluster" in row:  # Arena-Hard's category is the benchmark's own name
        category = row["cluster"]
    return Question(
        number if name is None else str(name),
        _texts(_first(row, "turns", "prompt", "instruction"), "turns", origin),
        "" if category is None else str(category),
        _texts(row["reference"], "reference", origin) if row.get("reference") else (),
        numbered=name is None,
    )


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _texts(value: Any, field: str, origin: str) -> tuple[str, ...]:
    """One text or several; a turn may stand as {"content": text}. Only a reference may be empty, for want of one."""
    items = value if isinstance(value, list) else [value]
    texts: list[Any] = [item.get("content") if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(t, str) and (t.strip() or field == "reference") for t in texts):
        raise InputError(f'{origin}: field "{field}" is not a text or a list of texts; mend the row')
    return tuple(texts)


def _with_references(questions: Sequence[Question], files: Sequence[Path]) -> tuple[Question, ...]:
    found = {}
    for file in files:
        for origin, row in _rows(file):
            try:
                found[str(row["question_id"])] = _texts(row["choices"][0]["turns"], "choices[0].turns", origin)
            except (KeyError, IndexError, TypeError) as error:
                raise InputError(f'{origin}: no "question_id" and "choices"[0]["turns"]; mend the row') from error
    return tuple(replace(q, reference=found.get(q.id, q.reference)) for q in questions)


def _check(benchmark: str, questions: Sequence[Question], source: str | Path) -> None:
    if not questions:
        raise InputError(f"{source} has no questions; give a file that has some")
    name, count = Counter(q.id for q in questions).most_common(1)[0]
    if count > 1:
        raise InputError(f"{source} has {count} questions of the id {name}; give each its own")
    if len(questions) > _SIZES[benchmark]:
        raise InputError(
            f"{source} has {len(questions)} questions, more than the {_SIZES[benchmark]} of {_NAMES[benchmark]}; "
            "give that benchmark's own"
        )
    turns = 2 if benchmark == "mt_bench" else 1
    for q in questions:
        if len(q.turns) != turns:
            raise InputError(
                f"{source}: question {q.id} has {len(q.turns)} turns and {_NAMES[benchmark]} {turns}; mend it"
            )
        if benchmark == "mt_bench" and q.category not in MT_BENCH_CATEGORIES:
            raise InputError(
                f"{source}: question {q.id} is of category {q.category or 'none'}; the categories are "
                f"{', '.join(MT_BENCH_CATEGORIES)}"
            )
