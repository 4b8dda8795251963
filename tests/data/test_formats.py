"""Reading: every format, every malformed row, every source, and the real data where it is at hand."""

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dvpo.data.formats import Notes, prompt_key, read
from dvpo.data.records import Example, Response, dump_examples
from dvpo.data.splits import check_disjoint
from dvpo.errors import InputError
from dvpo.files import sha256_file

PAIR = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
GROUP = {"prompt": "Q?", "completions": [{"model": "m", "response": "yes", "score": 2}]}
HH = {"chosen": "\n\nHuman: Q?\n\nAssistant: good", "rejected": "\n\nHuman: Q?\n\nAssistant: bad"}
SHARED = Path(__file__).parents[3] / "shared" / "data"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines; text and bytes are written as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def only(path: Path) -> Example:
    (example,) = read(path).examples
    return example


# Formats


def test_a_pair_with_all_its_fields(data: Path) -> None:
    write(data, {**PAIR, "score_chosen": 9, "score_rejected": 7.5, "chosen_model": "a", "rejected_model": "b"})
    responses = (Response("good", "a", 9.0), Response("bad", "b", 7.5))
    assert only(data) == Example((user("Q?"),), responses, ((0, 1),), "data.jsonl:1")


def test_what_the_package_wrote_is_read_back(data: Path) -> None:
    responses = (Response("good", "a", 1.0), Response("bad", None, None))
    example = Example((user("Q?"),), responses, ((0, 1),), "world:3")
    dump_examples([example], data)
    assert only(data) == example
    row = json.loads(data.read_text())
    broken = [("prompt", 3), ("prompt", ["Q?"]), ("origin", 7), ("responses", [{"words": 1}]), ("responses", "good")]
    for name, value in [*broken, *(("preferences", p) for p in ([[0, 5]], [[0, -1]], [[0]], [3], [[0, True]]))]:
        write(data, {**row, name: value})
        with pytest.raises(InputError, match=rf"data\.jsonl:1.*{name}"):
            read(data)


@pytest.mark.parametrize(
    "scores",
    [
        {"score_chosen": 9, "score_rejected": 7},
        {"metadata": {"score_chosen": 9, "score_rejected": 7}},
        {"chosen_score": 9, "rejected_score": 7},
    ],
)
def test_scores_are_found_in_every_place(data: Path, scores: dict[str, Any]) -> None:
    write(data, {**PAIR, **scores, "chosen_policy": "a", "rejected_policy": "b"})
    assert [(r.policy, r.score) for r in only(data).responses] == [("a", 9.0), ("b", 7.0)]


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "prompt": [user("Q?")]},
        {**PAIR, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {**PAIR, "chosen": [user("Q?"), assistant("good")], "rejected": [user("Q?"), assistant("bad")]},
        {**PAIR, "chosen": [user("Q?"), assistant("good")]},
        {"chosen": [user("Q?"), assistant("good")], "rejected": [user("Q?"), assistant("bad")]},
        {**PAIR, "prompt_id": "x", "messages": [user("Q?"), assistant("good")], "score_chosen": None},
        {**PAIR, "metadata": "not a table"},
        HH,
    ],
)
def test_spellings_of_the_same_pair_are_equal(data: Path, row: dict[str, Any]) -> None:
    assert only(write(data, row)) == only(write(data.with_name("data.jsonl"), PAIR))


def test_an_implicit_prompt_may_have_several_turns(data: Path) -> None:
    shared = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b"), user("c")]
    write(data, {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]})
    example = only(data)
    assert example.prompt == tuple(shared) and [r.text for r in example.responses] == ["d", "e"]


def test_turns_shared_beyond_the_given_prompt_join_it(data: Path) -> None:
    more = [assistant("a"), user("b")]
    write(data, {**PAIR, "chosen": [user("Q?"), *more, assistant("c")], "rejected": [*more, assistant("d")]})
    assert only(data).prompt == (user("Q?"), *more)


def test_a_row_that_differs_in_several_turns_is_dropped_and_counted(data: Path) -> None:
    chosen = [user("Q?"), assistant("a"), user("b"), assistant("c")]
    write(data, {"chosen": chosen, "rejected": [user("Q?"), assistant("x"), *chosen[2:]]}, PAIR)
    read_in = read(data)
    assert len(read_in.examples) == 1 and read_in.notes.multi_turn_difference == 1 and read_in.notes.rows == 2


def test_ties_contradictions_and_the_same_text(data: Path) -> None:
    write(
        data,
        {**PAIR, "score_chosen": 5, "score_rejected": 5},
        {**PAIR, "score_chosen": 5, "score_rejected": 6},
        {**PAIR, "chosen": "same", "rejected": "same", "score_chosen": 9, "score_rejected": 1},
    )
    read_in = read(data)
    assert [e.preferences for e in read_in.examples] == [(), ((0, 1),), ()]
    assert read_in.notes == Notes(rows=3, examples=3, responses=6, preferences=1, ties=2, contradictions=1)


def test_a_group_prefers_every_untied_scored_pair(data: Path) -> None:
    scores = [1, 3, None, 3, 2]
    completions = [{"policy": f"p{i}", "response": f"r{i}", "score": s} for i, s in enumerate(scores)]
    del completions[2]["score"]
    read_in = read(write(data, {"prompt": "Q?", "completions": completions}))
    (example,) = read_in.examples
    assert set(example.preferences) == {(1, 0), (3, 0), (4, 0), (1, 4), (3, 4)}
    assert read_in.notes.ties == 1 and example.responses[2] == Response("r2", "p2", None)


def test_openbmb_rows(data: Path) -> None:
    completions = [
        {"model": "alpaca-7b", "response": "a", "overall_score": 6.5, "score": 1, "annotations": {}},
        {"model": "bard", "response": "b", "overall_score": 7.0, "critique": "fine"},
    ]
    write(data, {"source": "evol", "instruction": "Do it", "models": ["alpaca-7b"], "completions": completions})
    example = only(data)
    assert example.prompt == (user("Do it"),) and example.preferences == ((1, 0),)
    assert example.responses == (Response("a", "alpaca-7b", 6.5), Response("b", "bard", 7.0))


def test_prompts_only(data: Path) -> None:
    rows = [{"prompt_id": "1", "prompt": "Q?", "dataset": "x"}, {"prompt": [user("R?")], "rejected": None}]
    read_in = read(write(data, *rows))
    assert [e.prompt for e in read_in.examples] == [(user("Q?"),), (user("R?"),)]
    assert read_in.notes == Notes(rows=2, examples=2)


def hh(*replies: str, start: str = "\n\nHuman: Q?\n\nAssistant:") -> dict[str, str]:
    return {"chosen": start + replies[0], "rejected": start + replies[1]}


def test_a_transcript_of_several_turns(data: Path) -> None:
    example = only(write(data, hh(" x", " y", start="\n\nHuman: a\n\nAssistant: b\n\nb2\n\nHuman: c\n\nAssistant:")))
    assert example.prompt == (user("a"), assistant("b\n\nb2"), user("c"))
    assert [r.text for r in example.responses] == ["x", "y"]


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        (" one\n\nAssistant: two", " three", ["one\n\nAssistant: two", "three"]),
        (" No.  Human: why?", " Yes.", ["No.  Human: why?", "Yes."]),
        (" Human: a", " b", ["Human: a", "b"]),
        (" see Assistant: x", " y", ["see Assistant: x", "y"]),
    ],
)
def test_markers_inside_a_reply_are_its_text(data: Path, first: str, second: str, texts: list[str]) -> None:
    example = only(write(data, hh(first, second)))
    assert example.prompt == (user("Q?"),) and [r.text for r in example.responses] == texts


@pytest.mark.parametrize(
    "row",
    [
        hh(" a\n\nHuman: b\n\nAssistant: c", " d"),
        hh(" a\n\nHuman: b\n\nAssistant: c", " a\n\nHuman: other\n\nAssistant: c"),
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
    ],
)
def test_transcripts_that_differ_in_several_turns_are_counted(data: Path, row: dict[str, str]) -> None:
    read_in = read(write(data, row))
    assert read_in.examples == [] and read_in.notes == Notes(rows=1, multi_turn_difference=1)


def test_repeated_human_markers_make_one_message(data: Path) -> None:
    example = only(write(data, hh(" x", " y", start="\n\nHuman: a\n\nHuman: b\n\nAssistant:")))
    assert example.prompt == (user("a\n\nHuman: b"),)


def test_the_same_transcript_twice_is_a_tie(data: Path) -> None:
    assert read(write(data, hh(" x", " x "))).notes == Notes(rows=1, examples=1, responses=2, ties=1)


# What is dropped


def test_empty_responses_are_dropped_and_counted(data: Path) -> None:
    completions = [{"response": t, "score": s} for t, s in [("", 5), ("a", 2), (" \n", 2), ("b", 1)]]
    read_in = read(write(data, {"prompt": "Q?", "completions": completions}, {"prompt": "R?", "completions": []}))
    (example,) = read_in.examples
    assert [r.text for r in example.responses] == ["a", "b"] and example.preferences == ((0, 1),)
    expected = Notes(rows=2, examples=1, responses=2, preferences=1, empty_responses=2, examples_without_responses=1)
    assert read_in.notes == expected


def test_a_pair_with_empty_replies(data: Path) -> None:
    read_in = read(write(data, {**PAIR, "chosen": ""}, {**PAIR, "chosen": " ", "rejected": ""}))
    assert [r.text for r in read_in.examples[0].responses] == ["bad"] and read_in.examples[0].preferences == ()
    assert read_in.notes.empty_responses == 3 and read_in.notes.examples_without_responses == 1


def test_duplicates_are_dropped_and_counted_once(data: Path) -> None:
    tied = {**PAIR, "score_chosen": 1, "score_rejected": 1}
    flipped = {**PAIR, "chosen": "bad", "rejected": "good"}
    read_in = read(write(data, PAIR, tied, PAIR, tied, flipped))
    assert [e.origin for e in read_in.examples] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:5"]
    assert read_in.notes == Notes(rows=5, examples=3, responses=6, preferences=2, ties=1, duplicates=2)


def test_notes_as_lines_and_counts(data: Path) -> None:
    notes = read(write(data, PAIR, PAIR)).notes
    assert notes.lines() == [
        "2 rows: 1 examples, 2 responses, 1 preferences",
        "1 exact duplicates of earlier examples dropped",
    ]
    assert notes.asdict()["duplicates"] == 1 and len(notes.asdict()) == 10


# Malformed rows

BAD: list[tuple[Any, Any, str]] = [
    (PAIR, "{", "not JSON"),
    (PAIR, '{"prompt": "a"} x', "not JSON"),
    (PAIR, "prompt,chosen", "not JSON"),
    (PAIR, b'{"prompt": "\xff\xfe"}', "not usable"),
    (PAIR, "[" * 100000, "not usable"),
    (PAIR, '{"score_chosen": ' + "9" * 5000 + "}", "not usable"),
    (PAIR, [PAIR], "not an object"),
    (PAIR, "null", "not an object"),
    (PAIR, '"text"', "not an object"),
    (PAIR, "3", "not an object"),
    (PAIR, {}, "fit no known format"),
    (PAIR, {"text": "a"}, "fit no known format"),
    (PAIR, {"prompt": "Q?", "chosen": "a"}, 'field "rejected" is missing'),
    (PAIR, {"prompt": "Q?", "rejected": "a"}, 'field "chosen" is missing'),
    (PAIR, {"prompt": "Q?", "chosen": "a", "rejected": None}, 'field "rejected" is missing'),
    (PAIR, {"prompt": "Q?"}, 'field "chosen" is missing'),
    (PAIR, {"chosen": "a", "rejected": "b"}, "prompt is missing or empty"),
    (PAIR, {**PAIR, "prompt": ""}, "prompt is missing or empty"),
    (PAIR, {**PAIR, "prompt": " \n"}, "prompt is missing or empty"),
    (PAIR, {**PAIR, "prompt": []}, "prompt is missing or empty"),
    (PAIR, {**PAIR, "prompt": [user(" ")]}, "prompt is missing or empty"),
    (PAIR, {**PAIR, "prompt": 3}, 'field "prompt" is not a list'),
    (PAIR, {**PAIR, "prompt": {"role": "user"}}, 'field "prompt" is not a list'),
    (PAIR, {**PAIR, "prompt": [{"role": "tool", "content": "a"}]}, "'tool', not one of"),
    (PAIR, {**PAIR, "prompt": [{"role": ["user"], "content": "a"}]}, "not one of"),
    (PAIR, {**PAIR, "prompt": [{"content": "a"}]}, "not one of"),
    (PAIR, {**PAIR, "prompt": [{"role": "user"}]}, 'field "prompt[0].content" is missing'),
    (PAIR, {**PAIR, "prompt": [{"role": "user", "content": ["a"]}]}, 'field "prompt[0].content" is not text'),
    (PAIR, {**PAIR, "prompt": ["a"]}, "prompt[0] is not an object"),
    (PAIR, {**PAIR, "prompt": [user("a"), assistant("b")]}, "ends with a message of the assistant"),
    (PAIR, {**PAIR, "chosen": 1}, 'field "chosen" is not a list'),
    (PAIR, {**PAIR, "chosen": []}, 'field "chosen" does not end'),
    (PAIR, {**PAIR, "chosen": [user("Q?")]}, 'field "chosen" does not end'),
    (PAIR, {**PAIR, "chosen": [user("other"), assistant("a")]}, 'field "chosen" does not begin with the prompt'),
    (PAIR, {"chosen": [assistant("a")], "rejected": [assistant("b")]}, "prompt is missing or empty"),
    (PAIR, '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "broken Unicode"),
    (PAIR, '{"prompt": "a", "chosen": "\\udc00", "rejected": "b"}', "broken Unicode"),
    (PAIR, {**PAIR, "score_chosen": float("nan")}, 'field "score_chosen" is not a finite number'),
    (PAIR, {**PAIR, "score_rejected": float("-inf")}, 'field "score_rejected" is not a finite number'),
    (PAIR, {**PAIR, "score_chosen": "9"}, "not a finite number"),
    (PAIR, {**PAIR, "score_chosen": True}, "not a finite number"),
    (PAIR, {**PAIR, "score_chosen": 10**400}, "not a finite number"),
    (PAIR, {**PAIR, "metadata": {"score_chosen": [1]}}, 'field "metadata.score_chosen" is not a finite number'),
    (PAIR, {**PAIR, "chosen_model": 3}, 'field "chosen_model" is not text'),
    (PAIR, GROUP, "a group row stands among pair rows"),
    (PAIR, {**PAIR, "completions": []}, 'has both "completions" and "chosen"'),
    (GROUP, PAIR, "a pair row stands among group rows"),
    (GROUP, {"prompt": "Q?"}, 'field "completions" is missing'),
    (GROUP, {"prompt": "Q?", "completions": "a"}, 'field "completions" is not a list'),
    (GROUP, {"prompt": "Q?", "completions": ["a"]}, "completions[0] is not an object"),
    (GROUP, {"prompt": "Q?", "completions": [{"model": "m"}]}, 'field "completions[0].response" is missing'),
    (GROUP, {"prompt": "Q?", "completions": [{"response": 3}]}, 'field "completions[0].response" is not text'),
    (GROUP, '{"prompt": "Q?", "completions": [{"response": "a", "score": NaN}]}', "not a finite number"),
    (GROUP, '{"prompt": "Q?", "completions": [{"response": "a", "score": 1e999}]}', "not a finite number"),
    (GROUP, {"prompt": "Q?", "completions": [{"response": "a", "overall_score": "N/A"}]}, "not a finite number"),
    (GROUP, {"prompt": "Q?", "completions": [{"response": "a", "model": 1}]}, "is not text"),
    (GROUP, {"completions": []}, 'field "prompt" is missing'),
    (GROUP, {"instruction": "", "completions": []}, "instruction is missing or empty"),
    (HH, {"chosen": HH["chosen"]}, 'field "rejected" is missing'),
    (HH, {**HH, "rejected": [assistant("a")]}, 'field "rejected" is not text'),
    (HH, {**HH, "rejected": "plain text"}, 'field "rejected" is no transcript'),
    (HH, {**HH, "rejected": ""}, 'field "rejected" is no transcript'),
    (HH, {**HH, "chosen": "\n\nHuman: a"}, 'field "chosen" is no transcript'),
    (HH, {**HH, "chosen": "\n\nAssistant: a"}, 'field "chosen" is no transcript'),
    (HH, hh(" a", " b", start="\n\nHuman: \n\nAssistant:"), "prompt is missing or empty"),
    (HH, PAIR, "a pair row stands among transcript rows"),
    ({"prompt": "Q?"}, PAIR, "a pair row stands among prompt rows"),
    ({"prompt": "Q?"}, {"prompt": "Q?", "response": "a"}, 'field "response" stands outside "completions"'),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD)
def test_a_malformed_row_is_named(data: Path, good: Any, bad: Any, reason: str) -> None:
    write(data, good, "", bad, good)
    with pytest.raises(InputError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith("data.jsonl:3: ") and reason in message
    assert message.endswith("; mend or remove it") and "\n" not in message and len(message) < 300


ALONE = [
    bad
    for _, bad, reason in BAD
    if "stands among" not in reason and bad not in ({"prompt": "Q?"}, {"chosen": "a", "rejected": "b"})
]


@pytest.mark.parametrize("bad", ALONE)
def test_a_malformed_first_row_is_named_too(data: Path, bad: Any) -> None:
    with pytest.raises(InputError, match=r"^data\.jsonl:1: "):
        read(write(data, bad))


def test_all_malformed_rows_are_counted_and_the_first_named(data: Path) -> None:
    bad = {"prompt": "Q?", "chosen": "a"}
    with pytest.raises(InputError) as caught:
        read(write(data, PAIR, bad, PAIR, "{", bad, bad))
    expected = (
        'data.jsonl:2: field "rejected" is missing (and 3 more malformed rows: lines 4, 5, 6); mend or remove them'
    )
    assert str(caught.value) == expected
    with pytest.raises(InputError, match=r"\(and 1 more malformed row: lines 2\)"):
        read(write(data, bad, bad))
    with pytest.raises(InputError, match=r"\(and 8 more malformed rows: lines 2, 3, 4, 5, \.\.\.\)"):
        read(write(data, *[bad] * 9))


# Sources


def test_gzip_and_parquet_give_the_same_examples(data: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    rows = [
        {**GROUP, "extra": None},
        {"prompt": "R?", "completions": [{"model": None, "response": "ü", "score": None}]},
    ]
    plain = read(write(data, *rows))
    packed = data.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(data.read_bytes()))
    table = data.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for other, origin in ((packed, "data.jsonl.gz:2"), (table, "data.parquet:row 2")):
        again = read(other)
        assert [(e.prompt, e.responses) for e in again.examples] == [(e.prompt, e.responses) for e in plain.examples]
        assert again.examples[1].origin == origin and again.digest == sha256_file(other) and again.notes == plain.notes


def test_a_malformed_parquet_row_is_named(data: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = data.with_suffix(".parquet")
    bad = {**PAIR, "rejected": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, bad, PAIR, bad]), table)
    with pytest.raises(InputError, match=r'^data\.parquet:row 2: field "rejected" is missing .*: row 4\)'):
        read(table)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("a.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 50, mtime=0)[:-9], "truncated or broken gzip"),
        ("a.jsonl.gz", json.dumps(PAIR).encode(), "truncated or broken gzip"),
        (
            "a.jsonl.gz",
            gzip.compress(json.dumps(PAIR).encode(), mtime=0)[:12] + b"\xff" * 40,
            "truncated or broken gzip",
        ),
        ("a.parquet", b"no parquet", "cannot be read as parquet"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.json", b"{}", "not a data file"),
        ("a.csv", b"a,b", "not a data file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_has_no_splits_and_a_limit_is_positive(data: Path) -> None:
    write(data, PAIR)
    with pytest.raises(InputError, match='no split "train"'):
        read(data, split="train")
    with pytest.raises(InputError, match="give at least 1"):
        read(data, limit=0)


def test_the_limit_stops_the_reading_but_not_the_digest(data: Path) -> None:
    write(data, PAIR, {**PAIR, "prompt": "R?"}, "{")
    read_in = read(data, limit=2)
    assert read_in.notes.rows == 2 and read_in.digest == sha256_file(data)


def test_long_lines_and_a_byte_order_mark(data: Path) -> None:
    long = "x" * 5_000_000
    data.write_bytes(b"\xef\xbb\xbf" + json.dumps({**PAIR, "chosen": long}).encode() + b"\r\n")
    assert only(data).responses[0].text == long


def test_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", PAIR)
    write(tmp_path / "train-00001-of-00002.jsonl", {**PAIR, "prompt": "R?"})
    write(tmp_path / "test.jsonl", {**PAIR, "prompt": "S?"})
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "more.jsonl", PAIR)
    everything, train = read(tmp_path), read(str(tmp_path), split="train")
    assert len(everything.examples) == 3 and everything.digest != train.digest
    assert [e.origin for e in train.examples] == ["train-00000-of-00002.jsonl:1", "train-00001-of-00002.jsonl:1"]
    assert read(tmp_path, split="test").digest == sha256_file(tmp_path / "test.jsonl")
    with pytest.raises(InputError, match=r'no data files .* with "valid" .*there: test\.jsonl, train-0'):
        read(tmp_path, split="valid")
    write(tmp_path / "test.jsonl", GROUP, "{")
    with pytest.raises(InputError, match=r"^test\.jsonl:2: .*: train-00000-of-00002\.jsonl:1, train-00001"):
        read(tmp_path)


def test_ambiguous_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data files"):
        read(tmp_path)
    write(tmp_path / "train_sft.jsonl", PAIR)
    write(tmp_path / "train_prefs.jsonl", PAIR)
    assert read(tmp_path).notes.duplicates == 1
    with pytest.raises(InputError, match=r"ambiguous: train_prefs\.jsonl, train_sft\.jsonl"):
        read(tmp_path, split="train")
    (tmp_path / "train_sft.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(InputError, match="ambiguous"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["no/such.jsonl", "owner/name", "owner/name@", "owner/name@main", "a/b/c@v1", "name@v1"]
)
def test_what_is_neither_path_nor_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="owner/name@REV") as caught:
        read(name)
    assert name in str(caught.value)


class Hub(types.ModuleType):
    """Stands in for the `datasets` library."""

    def __init__(self, result: Any) -> None:
        super().__init__("datasets")
        self.result, self.calls = result, []  # type: ignore[var-annotated]

    def load_dataset(self, name: str, *, revision: str, split: str | None) -> Any:
        self.calls.append((name, revision, split))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([PAIR, {**PAIR, "prompt": "R?"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    read_in = read("owner/name@v1.0", split="train")
    assert hub.calls == [("owner/name", "v1.0", "train")]
    assert read_in.examples[1].origin == "owner/name@v1.0:2"
    assert read_in.digest != read("owner/name@v1.0", split="test").digest
    hub.result = {"train": [PAIR]}
    assert len(read("owner/name@" + "0a" * 20).examples) == 1


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (
            ConnectionError("no\nnetwork"),
            'owner/name@v1 .split "train". cannot be loaded .*ConnectionError: no network',
        ),
        ({"train": [], "test": []}, "owner/name@v1 has the splits train, test"),
        ([], "owner/name@v1 has no rows"),
        ([{"text": "a"}], "^owner/name@v1:1: the fields"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, result: Any, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(result))
    with pytest.raises(InputError, match=reason) as caught:
        read("owner/name@v1", split="train")
    assert "\n" not in str(caught.value)


def test_empty_transcripts(data: Path) -> None:
    read_in = read(write(data, hh(" a", ""), hh("", " ")))
    assert [r.text for r in read_in.examples[0].responses] == ["a"]
    assert read_in.notes.empty_responses == 3 and read_in.notes.examples_without_responses == 1


# Real data


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real data (../shared/data beside the repository) is not here")
    return SHARED


def test_real_ultrafeedback(shared: Path) -> None:
    folder = shared / "ultrafeedback_binarized_1200"
    train, test = read(folder, split="train"), read(folder, split="eval")
    assert train.notes.rows == 1000 and test.notes.rows == 200

    def equal_scores(examples: list[Example]) -> int:
        return sum(len({r.score for r in e.responses}) == 1 and len(e.responses) == 2 for e in examples)

    # 111 and 25 have equal scores; the same text twice with unequal scores is a tie too.
    assert equal_scores(train.examples) == 111 and train.notes.ties == 114 and train.notes.empty_responses == 2
    assert equal_scores(test.examples) == 25 and test.notes.ties == 25
    check_disjoint({"train": train.examples, "eval": test.examples})


def test_real_alpaca_eval(shared: Path) -> None:
    read_in = read(shared / "alpaca_eval_multi_policy")
    assert len(read_in.examples) == 596
    assert read_in.notes.responses + read_in.notes.empty_responses == 596 * 20
    assert len({r.policy for e in read_in.examples for r in e.responses}) == 20
    assert len({prompt_key(e.prompt) for e in read_in.examples}) == 596


def test_real_hh(shared: Path) -> None:
    read_in = read(shared / "hh_rlhf_test" / "harmless_base_test.jsonl.gz")
    notes = Notes(rows=2312, examples=2312, responses=4620, preferences=2308, empty_responses=4)
    assert read_in.notes == notes
    assert all(e.prompt[0]["role"] == e.prompt[-1]["role"] == "user" for e in read_in.examples)


def test_real_prompts(shared: Path) -> None:
    counts = {"alpaca_eval_prompts": 805, "arena_hard_v0.1_questions": 500, "ifeval_prompts": 541}
    for name, count in counts.items():
        assert read(shared / "prompts" / f"{name}.jsonl").notes == Notes(rows=count, examples=count)
