"""Where the blame falls: steps, AUROC, the lowest step, and their table."""

import random
import time

import numpy as np
import pytest
import torch

from dvpo.data.records import Example, Response
from dvpo.errors import InputError
from dvpo.evaluation.credit import Marked, auroc, credit_table, evaluate_credit, lowest_hit, steps
from dvpo.evaluation.pairwise import evaluate_pairwise

LIMITS = {"max_prompt_tokens": 200, "max_response_tokens": 200}


def double_loop(scores: list[float], labels: list[bool]) -> float:
    """Every wrong token against every right one."""
    wrong = [s for s, is_wrong in zip(scores, labels, strict=True) if is_wrong]
    right = [s for s, is_wrong in zip(scores, labels, strict=True) if not is_wrong]
    return sum((w < r) + 0.5 * (w == r) for w in wrong for r in right) / (len(wrong) * len(right))


def marked(values: list[float], wrong: tuple[int, ...], group: int) -> Marked:
    return Marked(torch.tensor(values), wrong, group)


def test_a_step_is_the_value_after_less_the_value_before() -> None:
    assert steps(torch.tensor([1.0, 3.0, 2.0, 2.5])).tolist() == [2.0, -1.0, 0.5]


def test_auroc_by_hand() -> None:
    # Wrong: -2 and 1. Right: 0, 1, 3. -2 is below all three; 1 is below 3 and ties with 1.
    assert auroc([-2, 0, 1, 1, 3], [True, False, True, False, False]) == pytest.approx(4.5 / 6)
    assert auroc([-1, -1, 2, 3], [True, True, False, False]) == 1
    assert auroc([5, 4, 0, 1], [True, True, False, False]) == 0
    assert auroc([7, 7, 7], [True, False, False]) == 0.5


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_that_of_a_double_loop(levels: int) -> None:
    rng = random.Random(levels)
    for _ in range(20):
        scores = [rng.randrange(levels) / 7 for _ in range(40)]
        labels = [True, False, *(rng.random() < 0.3 for _ in range(38))]
        assert auroc(scores, labels) == pytest.approx(double_loop(scores, labels), abs=1e-12)


def test_auroc_sees_only_the_order() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(-5, 5, 60).astype(float), rng.random(60) < 0.4
    found = auroc(scores, labels)
    assert auroc(3 * scores + 2, labels) == found
    assert auroc(np.exp(scores), labels) == found
    assert auroc(-scores, labels) == pytest.approx(1 - found)
    assert auroc(scores, ~labels) == pytest.approx(1 - found)


@pytest.mark.parametrize("label", [True, False])
def test_auroc_needs_both_classes(label: bool) -> None:
    with pytest.raises(ValueError, match="both classes"):
        auroc([1, 2], [label, label])


def test_the_lowest_step_by_hand() -> None:
    rows = [np.array([0.0, -1, 2]), np.array([1.0, 0, 0, 3]), np.array([-9.0, 1]), np.array([-3.0, 0, 0, 0])]
    hits, chances = lowest_hit(rows, [(1,), (2,), (), (2, 3)])
    assert hits == [1, 0.5, 0]
    assert chances == pytest.approx([1 / 3, 1 / 4, 1 / 2])


def test_the_table_by_hand_leaves_eos_out() -> None:
    responses = [
        marked([0, 1, -1, 0, -50], (1,), 0),  # steps 1, -2, 1; EOS falls by 50
        marked([0, -1, -3, 9], (0,), 1),  # steps -1, -2
        marked([0, -1.5, 0], (), 1),  # step -1.5
    ]
    table = credit_table(responses, "value steps")
    # Wrong: -2 and -1. Right: 1, 1, -2, -1.5. -2 is below three and ties once; -1 is below two.
    assert table["auroc"] == pytest.approx((3.5 + 2) / 8)
    assert table["lowest_hit"] == 0.5
    assert table["lowest_chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert (table["n_responses"], table["n_wrong_tokens"]) == (3, 2)


def test_a_scalar_score_is_the_same_at_every_token_of_a_response() -> None:
    responses = [marked([9, 9, 9, 9, 9, -4], (0,), 0), marked([7, 7, 7, 2], (), 1)]
    table = credit_table(responses, "spread score")
    # -1 at four tokens (one of them wrong), 1 at two: the wrong one ties with three and is below two.
    assert table["auroc"] == pytest.approx(3.5 / 5)
    assert table["lowest_hit"] == table["lowest_chance"] == 0.25


def answers(count: int, blame: float, noise: float) -> list[Marked]:
    """Answers of twenty tokens; every other one has a wrong token, at which the value falls by `blame`."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        moves = rng.normal(0, noise, 21)
        wrong = (int(rng.integers(20)),) if i % 2 else ()
        moves[list(wrong)] -= blame
        made.append(Marked(torch.tensor(np.cumsum([0, *moves])), wrong, i // 2))
    return made


def test_a_perfect_an_inverted_and_a_blind_scorer() -> None:
    perfect = credit_table(answers(60, 100, 1), "value steps")
    assert perfect["auroc"] == perfect["lowest_hit"] == 1
    assert perfect["auroc_ci95"] == perfect["lowest_hit_ci95"] == [1, 1]
    assert perfect["lowest_chance"] == pytest.approx(0.05)
    inverted = credit_table(answers(60, -100, 1), "value steps")
    assert inverted["auroc"] == inverted["lowest_hit"] == 0
    low, high = credit_table(answers(400, 0, 1), "value steps")["auroc_ci95"]
    assert low < 0.5 < high


def test_intervals_contain_the_estimate_and_are_quick() -> None:
    responses = answers(2000, 1, 1)
    started = time.perf_counter()
    table = credit_table(responses, "value steps")
    assert time.perf_counter() - started < 6  # well under 3 s on an idle core
    for name in ("auroc", "lowest_hit"):
        low, high = table[f"{name}_ci95"]
        assert low < table[name] < high
        assert high - low < 0.08


def test_the_interval_is_that_of_a_plain_bootstrap_over_prompts() -> None:
    responses = answers(80, 1, 1)
    pieces = [(steps(r.values)[:-1].tolist(), [t in r.wrong for t in range(20)], r.group) for r in responses]
    rng = random.Random(0)
    found = []
    for _ in range(300):
        drawn = [p for g in (rng.randrange(40) for _ in range(40)) for p in pieces[2 * g : 2 * g + 2]]
        found.append(auroc([s for p in drawn for s in p[0]], [w for p in drawn for w in p[1]]))
    expected = np.percentile(found, [2.5, 97.5])
    assert credit_table(responses, "value steps")["auroc_ci95"] == pytest.approx(expected, abs=0.02)


def test_a_label_outside_the_response_is_refused() -> None:
    with pytest.raises(ValueError, match="before EOS"):
        credit_table([marked([0, 1, 2], (1,), 0)], "value steps")


def drawn(count: int) -> list[Marked]:
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        moves = rng.normal(0, 1, 21)
        wrong = (int(rng.integers(20)),) if i % 2 else ()
        moves[list(wrong)] -= 1
        made.append(Marked(torch.tensor(np.cumsum([0, *moves])), wrong, i // 2))
    return made


def test_answers_that_are_there_ten_times_tell_no_more() -> None:
    """They are of the same prompts, and prompts are what is drawn."""
    once = drawn(60)
    tenfold = credit_table([r for r in once for _ in range(10)], "value steps")
    for name, value in credit_table(once, "value steps").items():
        if not name.startswith("n_"):
            assert tenfold[name] == pytest.approx(value), name


def test_answers_over_the_limit_are_left_out_of_credit(checkpoints, examples, atlas) -> None:
    lengths = sorted(len(r.text.split()) + 1 for e in examples for r in e.responses)
    limit = lengths[12]
    left = sum(n > limit for n in lengths)
    found = evaluate_credit(checkpoints["llama", "value"], examples, atlas.to_json(), per_prompt=2, seed=0,
                            **LIMITS | {"max_response_tokens": limit})  # fmt: skip
    assert left > 0 and (found["left_out"], found["n_responses"]) == (left, len(lengths) - left)


def test_a_reward_model_is_read_at_its_last_token(checkpoints, examples, atlas) -> None:
    found = evaluate_credit(checkpoints["llama", "reward"], examples, atlas.to_json(), per_prompt=2, seed=0, **LIMITS)
    assert found["reading"] == "spread score"
    assert found["lowest_hit"] == pytest.approx(found["lowest_chance"])
    row = evaluate_pairwise(checkpoints["llama", "reward"], examples, **LIMITS).rows[0]
    assert set(row["better"]) == {"last", "tokens"}


def test_words_of_more_than_one_token_are_refused(checkpoints, examples, atlas) -> None:
    split = [Example(e.prompt, (Response("the river<eos> .", None),), (), e.origin) for e in examples]
    with pytest.raises(InputError, match="one token per word"):
        evaluate_credit(checkpoints["llama", "value"], split, atlas.to_json(), per_prompt=1, seed=0, **LIMITS)


def test_the_seed_and_the_trajectory_reach_credit(checkpoints, examples, atlas) -> None:
    def found(**options):
        chosen = {"per_prompt": 1, "seed": 0, **LIMITS, **options}
        return evaluate_credit(checkpoints["llama", "value"], examples, atlas.to_json(), **chosen)

    assert len({found(seed=s)["auroc"] for s in range(4)}) > 1
    assert found(trajectory_k=2)["auroc"] != found()["auroc"]


def test_no_wrong_word_is_said(checkpoints, examples, atlas) -> None:
    silent = [Example(e.prompt, (Response("surely", None),), (), e.origin) for e in examples]
    with pytest.raises(InputError, match="no chosen answer has a wrong word"):
        evaluate_credit(checkpoints["llama", "value"], silent, atlas.to_json(), per_prompt=1, seed=0, **LIMITS)
