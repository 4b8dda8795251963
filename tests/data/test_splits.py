"""Splits by prompt: disjoint, complete, stable, and the check that finds a leak."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.data.records import Example
from dvpo.data.splits import check_disjoint, data_files, is_hub_id, prompt_key, split_by_prompt
from dvpo.errors import InputError

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}


def example(text: str, origin: str = "a.jsonl:1") -> Example:
    return Example(({"role": "user", "content": text},), (), (), origin)


texts = st.lists(st.text(max_size=8), max_size=40)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(0, 5))
def test_splits_are_disjoint_complete_and_in_order(prompts: list[str], seed: int) -> None:
    examples = [example(text, f"a:{i}") for i, text in enumerate(prompts)]
    splits = split_by_prompt(examples, SHARES, seed)
    check_disjoint(splits)
    assert list(splits) == list(SHARES)
    assert sorted(e.origin for part in splits.values() for e in part) == sorted(e.origin for e in examples)
    for part in splits.values():
        assert [examples.index(e) for e in part] == sorted(examples.index(e) for e in part)


@settings(max_examples=50, deadline=None)
@given(texts, texts, st.integers(0, 5))
def test_adding_rows_moves_no_other(prompts: list[str], more: list[str], seed: int) -> None:
    before = split_by_prompt([example(text) for text in prompts], SHARES, seed)
    after = split_by_prompt([example(text) for text in more + prompts], SHARES, seed)
    for name, part in before.items():
        assert after[name][len(after[name]) - len(part) :] == part


def test_shares_are_met_and_the_seed_matters() -> None:
    examples = [example(f"prompt {i}") for i in range(4000)]
    splits = split_by_prompt(examples, SHARES, 0)
    assert len(splits["train"]) == pytest.approx(3200, abs=100)
    assert len(splits["test"]) == pytest.approx(400, abs=80)
    assert splits != split_by_prompt(examples, SHARES, 1)
    assert splits == split_by_prompt(examples, dict(reversed(SHARES.items())), 0)


def test_a_share_of_nought_gets_nothing() -> None:
    splits = split_by_prompt([example(str(i)) for i in range(200)], {"a": 1.0, "z": 0.0}, 0)
    assert len(splits["a"]) == 200 and splits["z"] == []


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.5 + 1e-6}, {"a": 1.5, "b": -0.5}, {"a": float("nan"), "b": 1.0}]
)
def test_shares_that_do_not_sum_to_one_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sum to 1"):
        split_by_prompt([example("x")], shares, 0)


def test_shares_may_be_off_by_rounding() -> None:
    assert split_by_prompt([], {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3 + 1e-12}, 0) == {"a": [], "b": [], "c": []}


def test_a_shared_prompt_is_named_with_both_origins() -> None:
    splits = {
        "train": [example("How do  I\ncook?" + " very" * 50, "train.jsonl:12")],
        "test": [example("other", "test.jsonl:2"), example("how do i cook?" + " VERY" * 50, "test.jsonl:3")],
    }
    with pytest.raises(InputError) as caught:
        check_disjoint(splits)
    message = str(caught.value)
    for part in ('"train" (train.jsonl:12)', '"test" (test.jsonl:3)', '"how do i cook? very'):
        assert part.lower() in message.lower()
    assert len(message) < 300 and "\n" not in message


def test_a_prompt_may_stand_twice_in_one_split() -> None:
    check_disjoint({"train": [example("x", "a:1"), example("x", "a:2")], "test": [example("y")]})


def test_prompt_key_sees_through_case_space_and_compatibility_but_not_roles() -> None:
    key = prompt_key(({"role": "user", "content": "Straße ﬁne  day\n"},))
    assert key == prompt_key(({"role": "user", "content": "STRASSE fine day"},))
    assert key != prompt_key(({"role": "system", "content": "STRASSE fine day"},))
    assert key != prompt_key(({"role": "user", "content": "strasse fine days"},))
    ab = prompt_key(({"role": "user", "content": "a"}, {"role": "user", "content": "b"}))
    assert ab != prompt_key(({"role": "user", "content": "a b"},))


def test_the_normal_form_holds_after_folding() -> None:
    """An upper-case letter with two marks: folding writes the marks in another order."""
    text = unicodedata.normalize("NFKC", "ǰ̣")
    assert prompt_key(({"role": "user", "content": text},)) == prompt_key(
        ({"role": "user", "content": unicodedata.normalize("NFKC", text.upper())},)
    )


def test_a_split_may_stand_anywhere_in_the_name(tmp_path: Path) -> None:
    (tmp_path / "data-train.jsonl").write_text("{}")
    (tmp_path / "folder-train.jsonl").mkdir()
    assert [f.name for f in data_files(tmp_path, "train")] == ["data-train.jsonl"]


def test_one_split_in_two_endings_is_ambiguous(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="ambiguous"):
        data_files(tmp_path, "train")


@pytest.mark.parametrize("name", ["a/b@main", "a/b@master", "a/b@HEAD", "a/b@v1 and more"])
def test_what_moves_is_no_revision(name: str) -> None:
    assert not is_hub_id(name)
    assert is_hub_id("a/b@mainline")
