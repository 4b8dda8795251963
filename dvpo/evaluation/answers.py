"""A policy's answers to questions: made from its folder and archived, or read from a file.

An answer is known by the policy's digest, the messages, the temperature, the length limit, the number format and the
seed, and is sampled with a seed made of these: an interrupted run gives the answers of one that was not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dvpo.data.records import Message
from dvpo.errors import InputError
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Question, read_rows
from dvpo.evaluation.judge import MISSING
from dvpo.files import sha256_file, sha256_tree

NOT_IN_FILE = "not in the file"
TOO_LONG = "prompt too long"


@dataclass(frozen=True)
class Answer:
    """A text for every turn of a question, or the reason why there is none.

    cut: the turns whose text met the length limit.
    """

    turns: tuple[str, ...]
    failure: str | None = None
    cut: int = 0


class Answers(Protocol):
    """Where answers come from. `identity` is what a result document says about it."""

    identity: dict[str, Any]

    def to(
        self, questions: Sequence[Question], temperatures: Sequence[float], *, archived_only: bool = False
    ) -> list[Answer]:
        """The answer to every question, in their order; what is only looked up may be `MISSING`."""
        ...


def source(given: str, archive: Archive, **settings: Any) -> Answers:
    """A file's answers, if `given` ends in .jsonl, else those of the policy in that folder (settings: see there)."""
    return AnswersOfFile(Path(given)) if given.endswith(".jsonl") else AnswersOfPolicy(Path(given), archive, **settings)


class AnswersOfPolicy:
    """Answers of the policy in a folder, generated where they are not archived yet."""

    def __init__(
        self,
        folder: Path,
        archive: Archive,
        *,
        max_new_tokens: int,
        batch_size: int = 8,
        seed: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        on_answer: Callable[[int, int], None] | None = None,
    ):
        """The model is loaded when an answer is missing.

        Args:
            max_new_tokens: of one turn.
            on_answer: called with (turns done, turns that were missing) after every batch.

        Raises:
            InputError: no such folder.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give that of a policy, or a .jsonl file of answers")
        self.folder, self.archive, self.on_answer = folder, archive, on_answer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.settings: dict[str, Any] = {
            "policy_sha256": sha256_tree(folder),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "dtype": dtype,
        }
        self.identity = {"name": folder.resolve().name, **self.settings}
        self._loaded: tuple[Any, Any] | None = None

    def to(
        self, questions: Sequence[Question], temperatures: Sequence[float], *, archived_only: bool = False
    ) -> list[Answer]:
        """See `Answers`. A later turn is asked with the earlier turns and their answers before it."""
        talks: list[list[Message]] = [list(q.context) for q in questions]
        done: list[list[dict[str, Any]]] = [[] for _ in questions]
        for turn in range(max((len(q.turns) for q in questions), default=0)):
            going = [
                i for i, q in enumerate(questions) if turn < len(q.turns) and all(t["failure"] is None for t in done[i])
            ]
            for i in going:
                talks[i].append({"role": "user", "content": questions[i].turns[turn]})
            found = self._turn([talks[i] for i in going], [temperatures[i] for i in going], archived_only)
            for i, record in zip(going, found, strict=True):
                done[i].append(record)
                talks[i].append({"role": "assistant", "content": record["text"] or ""})
        return [
            Answer(
                tuple(t["text"] or "" for t in turns),
                next((t["failure"] for t in turns if t["failure"] is not None), None),
                sum(t["cut"] for t in turns),
            )
            for turns in done
        ]

    def _turn(
        self, talks: Sequence[list[Message]], temperatures: Sequence[float], archived_only: bool
    ) -> list[dict[str, Any]]:
        """{"text", "failure", "cut"} of the next turn of every talk."""
        asked = [
            {**self.settings, "messages": list(talk), "temperature": t}
            for talk, t in zip(talks, temperatures, strict=True)
        ]
        records = [self.archive.get(Archive.key(a)) for a in asked]
        missing = sum(record is None for record in records)
        if archived_only:
            return [record or {"text": None, "failure": MISSING, "cut": False} for record in records]
        made = 0
        for temperature in sorted(set(temperatures)):
            places = [i for i, t in enumerate(temperatures) if t == temperature and records[i] is None]
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                for i, record in zip(batch, self._generate([asked[i] for i in batch], temperature), strict=True):
                    records[i] = record
                    self.archive.put(asked[i], record)
                made += len(batch)
                if self.on_answer:
                    self.on_answer(made, missing)
        return [record for record in records if record is not None]

    def _generate(self, asked: Sequence[dict[str, Any]], temperature: float) -> list[dict[str, Any]]:
        from dvpo.data.templates import encode_prompt
        from dvpo.models import most_tokens
        from dvpo.rollout.transformers import TransformersEngine

        model, tokenizer = self._load()
        longest = (most_tokens(model) or 1 << 30) - self.max_new_tokens
        prompts = {Archive.key(a): encode_prompt(tokenizer, a["messages"]) for a in asked}
        fitting = {key: ids for key, ids in prompts.items() if len(ids) <= longest}
        engine = TransformersEngine(model, tokenizer, self.max_new_tokens, temperature or 1.0)
        responses: list[list[int]] = []
        with engine.awake():
            if fitting and temperature == 0:
                responses = engine.greedy(list(fitting.values()))
            elif fitting:
                seeds = [int(key[:15], 16) for key in fitting]
                responses = [s.token_ids for s in engine.sample(list(fitting.values()), seeds)]
        by_key = dict(zip(fitting, responses, strict=True))
        return [_record(by_key.get(Archive.key(a)), tokenizer) for a in asked]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch

            from dvpo import models

            model: Any = models.load(self.folder, "policy", dtype=getattr(torch, self.settings["dtype"]))
            model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
            self._loaded = model, models.load_tokenizer(self.folder)
        return self._loaded


def _record(response: list[int] | None, tokenizer: Any) -> dict[str, Any]:
    """How a response is archived; None: its prompt left no room for one."""
    if response is None:
        return {"text": None, "failure": TOO_LONG, "cut": False}
    text = tokenizer.decode(response, skip_special_tokens=True).strip()
    return {"text": text, "failure": None, "cut": response[-1:] != [tokenizer.eos_token_id]}


@dataclass(frozen=True)
class _Row:
    """A row of a file of answers, and how it names its question: by its id, its text, or both."""

    origin: str
    id: str | None
    text: str | None
    turns: tuple[str, ...]


class AnswersOfFile:
    """Answers that somebody else made: the rows of a .jsonl file.

    A row names its question by the text of its first turn in "instruction" or "prompt", by "id", "question_id" or
    "uid", or by both. The number of a question that has no id of its own counts only where the row has no text.
    It answers in "turns" (texts), "output" (one text), "choices"[0]["turns"] or the assistant's "messages", and may
    name who answers: "model", "model_id" or "generator".
    """

    def __init__(self, path: Path):
        """Raises InputError where a row is malformed, or its question named again."""
        self.rows: list[_Row] = []
        names, known = set(), set()
        for origin, row in read_rows(path):
            given, text = _first(row, "id", "question_id", "uid"), _opening(_first(row, "instruction", "prompt"))
            name = None if given is None else str(given)
            question = text if name is None else name
            if question is None:
                raise InputError(f'{origin}: no "question_id" or "instruction" names the question; mend the row')
            if question in known:
                raise _again(origin, question)
            known.add(question)
            self.rows.append(_Row(origin, name, text, _turns(row, origin)))
            names.add(str(_first(row, "model", "model_id", "generator") or path.stem))
        self.identity = {"name": ", ".join(sorted(names)) or path.stem, "answers_sha256": sha256_file(path)}

    def to(
        self, questions: Sequence[Question], temperatures: Sequence[float], *, archived_only: bool = False
    ) -> list[Answer]:
        """See `Answers`. Temperatures say nothing to answers that are there already.

        Raises:
            InputError: a row's id and text are of different questions, two rows answer one question, or ids are
                numbers from 0 where those of the questions are numbers from 1.
        """
        by_id: dict[str | None, Question] = {q.id: q for q in questions}
        by_text: dict[str | None, list[Question]] = {}
        for q in questions:
            by_text.setdefault(q.turns[0].strip(), []).append(q)
        found: dict[str, tuple[str, ...]] = {}
        for row in self.rows:
            for q in _answered(row, by_id, by_text):
                if q.id in found:
                    raise _again(row.origin, q.id)
                found[q.id] = row.turns
        turns = [found.get(q.id, ()) for q in questions]
        return [
            Answer(said[: len(q.turns)]) if len(said) >= len(q.turns) else Answer((), NOT_IN_FILE)
            for q, said in zip(questions, turns, strict=True)
        ]


def _again(origin: str, question: str) -> InputError:
    return InputError(f"{origin}: a second answer to question {question[:60]}; keep one of them")


def _answered(
    row: _Row, by_id: Mapping[str | None, Question], by_text: Mapping[str | None, list[Question]]
) -> list[Question]:
    """The questions that a row answers: several where their texts are the same and no id says which."""
    named, told = by_id.get(row.id), by_text.get(row.text, [])
    if row.id == "0" and row.text is None and named is None and any(q.numbered for q in by_id.values()):
        raise InputError(
            f'{row.origin}: id 0, but questions without ids are numbered from 1; give "instruction", or number so too'
        )
    if named is None or (named.numbered and row.text is not None):
        return told
    if told and named not in told:
        raise InputError(f"{row.origin}: id {row.id} is not that of the question with this text; mend one of them")
    return [named]


def _opening(value: Any) -> str | None:
    """The first turn of one text or several; None where there is none, or a talk, which is not known by its start."""
    first = value[0] if isinstance(value, list) and value else value
    return first.strip() if isinstance(first, str) else None


def _turns(row: dict[str, Any], origin: str) -> tuple[str, ...]:
    try:
        if "choices" in row:
            said = row["choices"][0]["turns"]
        elif "messages" in row:
            said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        else:
            said = row["turns"] if "turns" in row else [row["output"]]
        texts = tuple(_text(s) for s in (said if isinstance(said, list) else [said]))
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f'{origin}: no answer in "turns", "output", "choices" or "messages"; mend the row') from error
    return texts


def _text(said: Any) -> str:
    """A text, or one in {"content": ...} or {"answer": ...}, as the benchmarks' own files hold it."""
    if isinstance(said, dict):
        said = said.get("content", said.get("answer"))
    if not isinstance(said, str):
        raise TypeError
    return said


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
