"""Accuracy, its baselines, and intervals over prompts."""

import random

import numpy as np
import pytest

from dvpo import models
from dvpo.data.pairs import EncodedPair
from dvpo.data.templates import Encoded
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.evaluation.pairwise import accuracies, evaluate_pairwise, score_pairs, wins
from dvpo.objectives.td import AGGREGATES, PERCENTILES
from dvpo.values import score_all


def row(prompt: int, better: float, worse: float, lengths: tuple[int, int] = (5, 5)) -> dict:
    return {
        "prompt": prompt,
        "better": {"mean": better, "tokens": lengths[0]},
        "worse": {"mean": worse, "tokens": lengths[1]},
    }


def test_ties_count_half() -> None:
    rows = [row(0, 1, 0), row(1, 0, 1), row(2, 3, 3), row(3, -1, -2)]
    assert wins(rows, "mean") == [1, 0, 0.5, 1]
    table = accuracies(rows)
    assert table["mean"]["accuracy"] == 0.625
    assert table["mean"]["n"] == 4


def test_the_baselines_stand_beside_every_accuracy() -> None:
    rows = [row(0, 1, 0, (9, 2)), row(1, 1, 0, (2, 9)), row(2, 1, 0, (4, 4)), row(3, 1, 0, (4, 3))]
    table = accuracies(rows)
    assert list(table) == ["mean", "longer wins", "chance"]
    assert table["longer wins"]["accuracy"] == 0.625
    assert table["chance"] == {"accuracy": 0.5, "ci95": [0.5, 0.5], "n": 4}
    assert table["mean"] == {"accuracy": 1.0, "ci95": [1.0, 1.0], "n": 4}


def test_scores_of_pairs_are_the_aggregates_of_the_values(checkpoints, texts) -> None:
    model = models.load(checkpoints["gpt2", "value"], "value")
    pairs = [EncodedPair(texts[2 * i], texts[2 * i + 1], i // 2) for i in range(3)]
    rows = score_pairs(model, pairs, 0)
    assert [r["prompt"] for r in rows] == [0, 0, 1]
    for pair, found in zip(pairs, rows, strict=True):
        for text, scores in ((pair.better, found["better"]), (pair.worse, found["worse"])):
            ((_, values_S),) = score_all(model, [text], 0)
            actions = values_S[1:].double().numpy()
            assert set(scores) == {*AGGREGATES, "tokens"}
            assert scores["tokens"] == len(text.response_ids)
            assert scores["mean"] == pytest.approx(actions.mean(), abs=2e-5)
            assert scores["last"] == pytest.approx(actions[-1], abs=2e-5)
            for how, percent in PERCENTILES.items():
                assert scores[how] == pytest.approx(np.percentile(actions, percent), abs=2e-5)


def test_a_model_that_says_one_thing_wins_half(checkpoints) -> None:
    """A value head of zeros ties every pair: 0.5, not 0 or 1."""
    model = models.load(checkpoints["llama", "policy"], "value", fresh_head=True)
    pairs = [EncodedPair(Encoded([5, 6], [7, 8, 9]), Encoded([5, 6], [7]), i) for i in range(3)]
    table = accuracies(score_pairs(model, pairs, 0))
    assert {table[how]["accuracy"] for how in AGGREGATES} == {0.5}
    assert table["longer wins"]["accuracy"] == 1.0


def plain_bootstrap(values: list[float], groups: list[int], resamples: int, seed: int) -> tuple[float, float]:
    """Draws prompts with replacement, one at a time, and takes the mean over all their values."""
    rng = random.Random(seed)
    names = sorted(set(groups))
    means = []
    for _ in range(resamples):
        drawn: list[float] = []
        for _ in names:
            name = rng.choice(names)
            drawn += [v for v, g in zip(values, groups, strict=True) if g == name]
        means.append(sum(drawn) / len(drawn))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def test_interval_is_close_to_a_plain_bootstrap_over_prompts() -> None:
    rng = random.Random(0)
    groups = [g for g in range(40) for _ in range(1 + g % 3)]
    values = [float(rng.random() < 0.2 + 0.6 * (g % 2)) for g in groups]
    mean, (low, high) = mean_with_interval(values, groups, resamples=4000)
    assert mean == pytest.approx(sum(values) / len(values))
    plain_low, plain_high = plain_bootstrap(values, groups, 1500, 1)
    assert low == pytest.approx(plain_low, abs=0.02)
    assert high == pytest.approx(plain_high, abs=0.02)


def test_interval_of_independent_values_has_the_normal_width() -> None:
    values = [float(i % 2) for i in range(400)]
    mean, (low, high) = mean_with_interval(values)
    assert mean == 0.5
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_values_that_hang_together_widen_the_interval() -> None:
    """Forty prompts of ten equal values know as much as forty values, not four hundred: sqrt(10) wider."""
    values = [float(g % 2) for g in range(40) for _ in range(10)]
    groups = [g for g in range(40) for _ in range(10)]
    _, alone = mean_with_interval(values)
    _, together = mean_with_interval(values, groups)
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(10**0.5, rel=0.15)


def test_intervals_are_reproducible_and_do_not_depend_on_group_names() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_with_interval(values, [0, 0, 1, 1, 2]) == mean_with_interval(values, [10, 10, 70, 70, 500])
    assert mean_with_interval(values, seed=3) == mean_with_interval(values, seed=3)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_with_interval([])


LIMITS = {"max_prompt_tokens": 200, "max_response_tokens": 200}


def test_each_limit_of_pairwise_is_its_own(checkpoints, examples) -> None:
    found = evaluate_pairwise(checkpoints["llama", "value"], examples, max_prompt_tokens=200, max_response_tokens=3)
    assert found.said == ["24 of 24 responses were over the length limit and were cut (no EOS)"]


def test_pairs_as_long_as_the_model_reads_are_kept(checkpoints, examples, tmp_path) -> None:
    model = models.load(checkpoints["llama", "value"], "value")
    tokenizer = models.load_tokenizer(checkpoints["llama", "value"])
    from dvpo.data.pairs import Encoder, Pick

    encoder = Encoder(tokenizer, examples, 200, 200)
    sizes = [
        max(len(t.prompt_ids) + len(t.response_ids) for t in (encoder.text(Pick(i, 0)), encoder.text(Pick(i, 1))))
        for i in range(len(examples))
    ]
    reads = sorted(sizes)[5]
    model.config.max_position_embeddings = reads
    models.save(model, tokenizer, tmp_path)
    found = evaluate_pairwise(tmp_path, examples, **LIMITS)
    over = sum(n > reads for n in sizes)
    assert len(found.rows) == 12 - over
    assert found.said == [f"{over} of 12 pairs were left out: longer than the {reads} tokens that the model reads"]


def test_pairs_are_drawn_and_scored_as_asked(checkpoints, examples, texts) -> None:
    folder = checkpoints["llama", "value"]
    drawn = [
        [r["prompt"] for r in evaluate_pairwise(folder, examples, most=5, seed=s, **LIMITS).rows] for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(range(5)) not in drawn
    plain, rough = (evaluate_pairwise(folder, examples, bf16=b, **LIMITS).rows for b in (False, True))
    assert plain != rough
