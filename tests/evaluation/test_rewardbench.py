"""RewardBench: sections as the rewardbench package weighs them, ties, parts, and scores that nothing else changes."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from dvpo.evaluation import rewardbench as rb
from dvpo.objectives.td import AGGREGATES
from dvpo.values import score_all

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewardbench.json").read_text(encoding="utf-8"))
PARTS = Path(__file__).parents[3] / "shared" / "data" / "rewardbench_parts"


def row(subset: str, chosen: float, rejected: float, lengths: tuple[int, int] = (2, 1)) -> dict[str, Any]:
    chosen_scores, rejected_scores = (
        {"mean": s, "longer wins": n} for s, n in zip((chosen, rejected), lengths, strict=True)
    )
    return {"subset": subset, "chosen": chosen_scores, "rejected": rejected_scores}


def rows_of(wins: dict[str, int]) -> list[dict[str, Any]]:
    """Every pair of the subsets, so many of which are won."""
    return [row(subset, i < won, 0.5) for subset, won in wins.items() for i in range(rb.PAIRS[subset])]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rb.summary(rows, [str(i) for i in range(len(rows))])


def test_subsets_sections_and_weights_are_those_of_the_package() -> None:
    assert {section: list(subsets) for section, subsets in rb.SECTIONS.items()} == GOLDEN["sections"]
    assert GOLDEN["weights"] == rb.WEIGHTS
    assert (len(rb.PAIRS), sum(rb.PAIRS.values())) == (23, 2985)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_section_scores_are_those_of_the_package(case: dict[str, Any]) -> None:
    found = summary(rows_of(case["wins"]))["sections"]
    assert {s: e["accuracy"]["mean"]["accuracy"] for s, e in found.items()} == pytest.approx(case["sections"])


def test_math_weighs_as_much_as_the_code_together() -> None:
    """All of math and none of the code is won: one half, though math has 447 of 1431 pairs."""
    wins = {subset: 447 if subset == "math-prm" else 0 for subset in rb.SECTIONS["Reasoning"]}
    entry = summary(rows_of(wins))["sections"]["Reasoning"]
    assert entry["accuracy"]["mean"]["accuracy"] == pytest.approx(0.5)
    assert (entry["label"], entry["pairs"], entry["of"]) == ("Reasoning", 1431, 1431)


def test_a_tie_is_a_loss() -> None:
    rows = [row("donotanswer", 1, 1, (3, 3)), row("donotanswer", 1, 0, (1, 2)), row("donotanswer", 0, 1, (4, 2))]
    accuracy = summary(rows)["subsets"]["donotanswer"]["accuracy"]
    assert accuracy["mean"]["accuracy"] == pytest.approx(1 / 3)
    assert accuracy["longer wins"]["accuracy"] == pytest.approx(1 / 3)
    assert accuracy["chance"] == {"accuracy": 0.5, "ci95": [0.5, 0.5]}


def test_what_lacks_a_pair_is_named_a_part() -> None:
    whole = summary(rows_of(dict.fromkeys(rb.PAIRS, 10)))
    assert whole["benchmark"] == "RewardBench"
    assert whole["missing_subsets"] == []
    assert [e["label"] for e in whole["sections"].values()] == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    sections = [e["accuracy"]["mean"]["accuracy"] for e in whole["sections"].values()]
    assert whole["average"]["mean"]["accuracy"] == pytest.approx(np.mean(sections))

    part = summary(rows_of(dict.fromkeys(rb.PAIRS, 10))[:-1])  # one pair of hep-rust is gone
    assert (part["benchmark"], part["average"]) == ("part of RewardBench", None)
    assert part["subsets"]["hep-rust"]["label"] == "part of hep-rust"
    assert [e["label"] for e in part["sections"].values()] == ["Chat", "Chat Hard", "Safety", "part of Reasoning"]

    subset = summary(rows_of({"llmbar-natural": 60}))
    assert list(subset["sections"]) == ["Chat Hard"]
    assert subset["sections"]["Chat Hard"]["label"] == "part of Chat Hard"
    assert subset["subsets"]["llmbar-natural"]["label"] == "llmbar-natural"
    assert len(subset["missing_subsets"]) == 22


def test_intervals_have_the_width_of_weighted_binomials() -> None:
    wins = {subset: round(0.7 * n) for subset, n in rb.SECTIONS["Reasoning"].items()}
    entry = summary(rows_of(wins))["sections"]["Reasoning"]["accuracy"]["mean"]
    weights = {subset: rb.WEIGHTS[subset] / 1968 for subset in wins}
    variance = sum(w**2 * 0.7 * 0.3 / rb.PAIRS[subset] for subset, w in weights.items())
    low, high = entry["ci95"]
    assert low < entry["accuracy"] < high
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    rows = rows_of({"donotanswer": 68})
    accuracy = rb.summary(rows, ["the same"] * len(rows))["subsets"]["donotanswer"]["accuracy"]["mean"]
    assert accuracy == {"accuracy": 0.5, "ci95": [0.5, 0.5]}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_score_does_not_depend_on_its_company(arch: str, checkpoints: Any, texts: list[Encoded]) -> None:
    """To the last bit: one difference there would decide a tie."""
    model = models.load(checkpoints[arch, "value"], "value")
    together = rb.score_texts(model, texts, 0, AGGREGATES)
    order = random.Random(0).sample(range(len(texts)), len(texts))
    mixed = rb.score_texts(model, [texts[i] for i in order], 0, AGGREGATES)
    alone = [rb.score_texts(model, [text], 0, AGGREGATES)[0] for text in texts]
    assert together == alone
    assert [together[i] for i in order] == mixed
    for text, scores in zip(texts, alone, strict=True):
        ((_, values_S),) = score_all(model, [text], 0)
        assert scores["mean"] == pytest.approx(values_S[1:].mean().item(), abs=1e-5)
        assert scores["last"] == pytest.approx(values_S[-1].item(), abs=1e-5)
        assert scores["longer wins"] == len(text.response_ids)


def pair(chosen: str, rejected: str, name: str = "1") -> rb.Pair:
    return rb.Pair("which city is this ?", chosen, rejected, "mt-bench-easy", name)


def test_equal_answers_lose_under_every_aggregate(checkpoints: Any) -> None:
    found = rb.evaluate_rewardbench(checkpoints["llama", "value"], [pair("the city", "the city")])
    accuracy = found["sections"]["Chat"]["accuracy"]
    assert list(accuracy) == [*AGGREGATES, "longer wins", "chance"]
    assert {name: cell["accuracy"] for name, cell in accuracy.items() if name != "chance"} == dict.fromkeys(
        [*AGGREGATES, "longer wins"], 0
    )


def test_a_reward_model_is_read_at_its_last_token(checkpoints: Any) -> None:
    folder = checkpoints["gpt2", "reward"]
    found = rb.evaluate_rewardbench(folder, [pair("the city is far", "the river")])
    assert list(found["sections"]["Chat"]["accuracy"]) == ["last", "longer wins", "chance"]
    tokenizer, model = models.load_tokenizer(folder), models.load(folder, "reward")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "which city is this ?"}], add_generation_prompt=True, tokenize=False
    )
    for side, answer in (("chosen", "the city is far"), ("rejected", "the river")):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids += [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert found["rows"][0][side]["last"] == pytest.approx(expected, abs=1e-5)


def test_a_text_over_the_models_length_is_counted_and_not_cut(checkpoints: Any) -> None:
    pairs = [pair("the city", "the river", "short"), pair("the " * 300, "the river", "long")]
    found = rb.evaluate_rewardbench(checkpoints["llama", "value"], pairs)
    assert found["too_long"] == {"count": 1, "limit": 256, "rows": ["long"]}
    assert [r["id"] for r in found["rows"]] == ["short"]
    assert found["subsets"]["mt-bench-easy"]["pairs"] == 1
    with pytest.raises(InputError, match="no pair fits the 256 tokens"):
        rb.evaluate_rewardbench(checkpoints["llama", "value"], pairs[1:])


def test_a_score_that_is_no_number_is_an_error(checkpoints: Any, tmp_path: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(checkpoints["llama", "value"])
    model.score.bias.data.fill_(float("nan"))
    models.save(model, models.load_tokenizer(checkpoints["llama", "value"]), tmp_path)
    with pytest.raises(StageError, match="score of pair 7 is not finite"):
        rb.evaluate_rewardbench(tmp_path, [pair("the city", "the river", "7")])


def raw(subset: str = "hep-go", **fields: Any) -> dict[str, Any]:
    models_of_pair = {"chosen_model": "human", "rejected_model": "bug"}
    return {"prompt": "p", "chosen": "c", "rejected": "r", "subset": subset, "id": 12, **models_of_pair, **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(r) + "\n" for r in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as f:
            f.write(text)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_files_of_the_hub_are_read(ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"filtered-00000-of-00001{ending}", [raw(), raw("donotanswer", id=13, rejected="")])
    write(tmp_path / f"raw-00000-of-00001{ending}", [raw(id=i) for i in range(9)])
    data = rb.read_pairs(tmp_path)
    assert data.pairs == [rb.Pair("p", "c", "r", "hep-go", "12"), rb.Pair("p", "c", "", "donotanswer", "13")]
    assert len(rb.read_pairs(tmp_path, "raw").pairs) == 9
    assert data.notes == []


def test_a_row_without_id_is_named_by_its_place(tmp_path: Path) -> None:
    nameless = {name: value for name, value in raw().items() if name != "id"}
    assert rb.read_pairs(write(tmp_path / "part.jsonl", [raw(), nameless])).pairs[1].name == "part.jsonl:2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([raw(), raw(subset="hep-perl")], 'x.jsonl:2: "hep-perl" is none of the 23 subsets'),
        ([raw(), raw(rejected=None)], 'x.jsonl:2: field "rejected" is missing'),
        ([{"prompt": "p", "chosen": "c", "subset": "hep-go"}], 'x.jsonl:1: field "rejected" is missing'),
        ([raw()] * 165, "x.jsonl has 165 pairs of hep-go and RewardBench 164"),
        ([{"prompt": "only"}], "x.jsonl has no rows with prompt, chosen, rejected, subset"),
        ([], "x.jsonl has no rows"),
    ],
)
def test_bad_data_is_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        rb.read_pairs(write(tmp_path / "x.jsonl", rows))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"prompt": \n', r"x\.jsonl:1: the line is not JSON"),
        ("x.jsonl.gz", gzip.compress(json.dumps(raw()).encode(), mtime=0)[:-9], r"x\.jsonl\.gz cannot be read"),
        ("x.parquet", b"no table", r"x\.parquet cannot be read as parquet"),
    ],
    ids=["jsonl", "gzip", "parquet"],
)
def test_files_that_cannot_be_read_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        rb.read_pairs(tmp_path / name)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is no file or folder; give one, or a hub id"):
        rb.read_pairs(tmp_path / "nowhere")


@pytest.mark.skipif(not PARTS.is_dir(), reason="the parts of RewardBench are not on this machine")
def test_the_parts_run_and_are_named_as_parts(checkpoints: Any) -> None:
    data = rb.read_pairs(PARTS)
    assert len(data.pairs) == 1403
    assert data.notes == ["xstest_completions.jsonl.gz was left out: its rows are no pairs (no chosen, no rejected)"]
    few = [p for p in data.pairs if p.subset in ("llmbar-adver-manual", "hep-go")][::8]
    found = rb.evaluate_rewardbench(checkpoints["llama", "value"], few)
    assert found["benchmark"] == "part of RewardBench"
    assert [e["label"] for e in found["sections"].values()] == ["part of Chat Hard", "part of Reasoning"]
    assert len(found["rows"]) + found["too_long"]["count"] == len(few)
