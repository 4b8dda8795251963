"""The readers on rows of exactly the public data sets' schemas, as JSON lines and as the hub's parquet."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvpo.data.formats import Dataset, read
from dvpo.data.records import Response

SHARED = Path(__file__).parents[3] / "shared" / "data"
Rows = list[dict[str, Any]]


def rating(score: str) -> dict[str, Any]:
    return {"Rating": score, "Rationale": f"It deserves {score}."}


def completion(model: str, response: str, overall: float, fine: float) -> dict[str, Any]:
    """One answer as openbmb/UltraFeedback has it: ratings as text, two scores, and the prompt of its system."""
    return {
        "annotations": {
            "helpfulness": {"Type": ["1"], "Rationale For Rating": "None.", **rating("4")},
            "honesty": rating("5"),
            "instruction_following": rating("N/A"),
            "truthfulness": {"Type": ["None"], "Rationale For Rating": "No errors.", **rating("5")},
        },
        "critique": "Well done.",
        "custom_system_prompt": "As an AI assistant, answer truthfully.",
        "fine-grained_score": fine,
        "model": model,
        "overall_score": overall,
        "principle": "honesty",
        "response": response,
    }


def ultrafeedback() -> Rows:
    """Four answers of which two tie; one answer alone; none at all."""
    models = ["alpaca-7b", "gpt-4", "falcon-40b-instruct", "ultralm-13b"]
    scores = ((3.0, 2.5), (9.0, 5.0), (7.5, 4.5), (7.5, 4.0))
    four = [completion(m, f"answer of {m}", *s) for m, s in zip(models, scores, strict=True)]
    return [
        {
            "completions": completions,
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
            "instruction": f"What is {i}?",
            "models": models,
            "source": "evol_instruct",
        }
        for i, completions in enumerate((four, four[:1], []))
    ]


def binarized() -> Rows:
    """HuggingFaceH4/ultrafeedback_binarized: a plain pair, a tie in score, and an empty rejected answer."""

    def row(i: int, chosen: str, rejected: str, score: float, other: float) -> dict[str, Any]:
        asked = {"content": f"Name river {i}.", "role": "user"}
        good, bad = ([asked, {"content": text, "role": "assistant"}] for text in (chosen, rejected))
        return {
            "chosen": good,
            "messages": good,
            "prompt": asked["content"],
            "prompt_id": f"{i:064x}",
            "rejected": bad,
            "score_chosen": score,
            "score_rejected": other,
        }

    return [
        row(0, "The Rhine.", "A lake.", 8.0, 5.5),
        row(1, "The Po.", "Po.", 7.0, 7.0),
        row(2, "Volga", "", 4.0, 1.0),
    ]


def hh() -> Rows:
    """Anthropic/hh-rlhf: a first turn, a later turn, and a pair that differs from an early turn on."""
    talk = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: How far is it?"
    early = "\n\nHuman: Hi.\n\nAssistant: {}\n\nHuman: And?\n\nAssistant: {}"
    return [
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {
            "chosen": f"{talk}\n\nAssistant: Ten miles.",
            "rejected": f"{talk}\n\nAssistant: Go away.",
        },
        {"chosen": early.format("Yes.", "More."), "rejected": early.format("No.", "Less.")},
    ]


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def reading(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Rows], Dataset]:
    """Writes rows in a form and reads them back."""

    def run(rows: Rows) -> Dataset:
        path = tmp_path / f"train.{request.param}"
        if request.param == "parquet":
            import datasets

            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if request.param.endswith("gz") else text)
        return read(path)

    return run


def test_ultrafeedback_has_a_preference_for_every_untied_pair_of_overall_scores(reading) -> None:
    data = reading(ultrafeedback())
    four, one = data.examples
    assert four.prompt == ({"role": "user", "content": "What is 0?"},)
    assert four.responses[1] == Response("answer of gpt-4", "gpt-4", 9.0)
    assert [r.score for r in four.responses] == [3.0, 9.0, 7.5, 7.5]
    assert set(four.preferences) == {(1, 0), (2, 0), (3, 0), (1, 2), (1, 3)}
    assert (len(one.responses), one.preferences) == (1, ())
    notes = data.notes
    assert (notes.rows, notes.examples, notes.ties, notes.examples_without_responses) == (3, 2, 1, 1)


def test_ultrafeedback_binarized_is_a_pair_with_both_scores(reading) -> None:
    data = reading(binarized())
    pair, tie, alone = data.examples
    assert pair.prompt == ({"role": "user", "content": "Name river 0."},)
    assert pair.responses == (Response("The Rhine.", None, 8.0), Response("A lake.", None, 5.5))
    assert (pair.preferences, tie.preferences, alone.preferences) == (((0, 1),), (), ())
    assert [r.text for r in alone.responses] == ["Volga"]
    assert (data.notes.ties, data.notes.empty_responses) == (1, 1)


def test_hh_is_a_talk_with_two_ends(reading) -> None:
    data = reading(hh())
    first, later = data.examples
    assert first.prompt == ({"role": "user", "content": "Why?"},)
    assert [r.text for r in first.responses] == ["Because.", "No."]
    assert [m["role"] for m in later.prompt] == ["user", "assistant", "user"]
    assert later.prompt[-1]["content"] == "How far is it?"
    assert (first.preferences, data.notes.multi_turn_difference) == (((0, 1),), 1)


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not beside the repository")
def test_the_real_hh_rows_are_of_this_schema() -> None:
    file = next((SHARED / "hh_rlhf_test").glob("*.jsonl.gz"))
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert all(row.keys() == hh()[0].keys() for row in rows)
    data = read(file)
    notes = data.notes
    dropped = notes.multi_turn_difference + notes.examples_without_responses + notes.duplicates
    assert (notes.rows, notes.examples) == (len(rows), len(rows) - dropped)
    assert notes.examples > 0.9 * len(rows)
