"""Pairwise accuracy: how often a model scores the preferred response higher, under every aggregate."""

from collections.abc import Sequence
from typing import Any

import torch

from dvpo.data.pairs import EncodedPair
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.objectives.td import AGGREGATES, aggregate
from dvpo.values import score_all


def score_pairs(
    model: Any, pairs: Sequence[EncodedPair], pad_id: int, aggregates: Sequence[str] = AGGREGATES, bf16: bool = False
) -> list[dict[str, Any]]:
    """One row per pair: {"prompt", "better": {aggregate: score, "tokens": T}, "worse": {...}}."""
    texts = [text for pair in pairs for text in (pair.better, pair.worse)]
    scores: list[dict[str, float]] = [{} for _ in texts]
    for i, values_S in score_all(model, texts, pad_id, bf16=bf16):
        mask_1_S = torch.ones(1, len(values_S), dtype=torch.bool)
        scores[i] = {how: float(aggregate(values_S[None], mask_1_S, how)) for how in aggregates}
        scores[i]["tokens"] = len(texts[i].response_ids)
    return [{"prompt": p.prompt, "better": scores[2 * i], "worse": scores[2 * i + 1]} for i, p in enumerate(pairs)]


def wins(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """1 where the better response has the larger `key`, 0 where the smaller, 0.5 where they are equal."""
    return [(r["better"][key] > r["worse"][key]) + 0.5 * (r["better"][key] == r["worse"][key]) for r in rows]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy of every aggregate and of the two baselines, each with an interval over prompts.

    Returns:
        {name: {"accuracy", "ci95": [low, high], "n": pairs}}; `longer wins` prefers the response of more tokens and
        `chance` is 0.5 by definition.
    """
    groups = [r["prompt"] for r in rows]
    table: dict[str, dict[str, Any]] = {}
    for key in rows[0]["better"]:
        mean, interval = mean_with_interval(wins(rows, key), groups)
        name = "longer wins" if key == "tokens" else key
        table[name] = {"accuracy": mean, "ci95": list(interval), "n": len(rows)}
    table["chance"] = {"accuracy": 0.5, "ci95": [0.5, 0.5], "n": len(rows)}
    return table
