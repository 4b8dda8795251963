"""Pairwise accuracy: how often a model scores the preferred response higher, under every aggregate."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dvpo import models
from dvpo.data.pairs import EncodedPair, Encoder, preference_picks
from dvpo.data.records import Example
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.evaluation.intervals import means_with_intervals
from dvpo.objectives.td import AGGREGATES, aggregate
from dvpo.values import score_all


def score_pairs(
    model: Any, pairs: Sequence[EncodedPair], pad_id: int, aggregates: Sequence[str] = AGGREGATES, bf16: bool = False
) -> list[dict[str, Any]]:
    """One row per pair: {"prompt", "better": {aggregate: score, "tokens": T}, "worse": {...}}. `pairs` is not empty."""
    texts = {id(text): text for pair in pairs for text in (pair.better, pair.worse)}  # a text may be in many pairs
    order = list(texts.values())
    rows: list[torch.Tensor] = [torch.empty(0)] * len(order)
    for i, values_S in score_all(model, order, pad_id, bf16=bf16):
        rows[i] = values_S
    values_N_S = pad_sequence(rows, batch_first=True)
    mask_N_S = torch.arange(values_N_S.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    found = {how: aggregate(values_N_S, mask_N_S, how).tolist() for how in aggregates}
    found["tokens"] = [len(text.response_ids) for text in order]
    scores = {key: {name: column[i] for name, column in found.items()} for i, key in enumerate(texts)}
    return [{"prompt": p.prompt, "better": scores[id(p.better)], "worse": scores[id(p.worse)]} for p in pairs]


def wins(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """1 where the better response has the larger `key`, 0 where the smaller, 0.5 where they are equal."""
    return [(r["better"][key] > r["worse"][key]) + 0.5 * (r["better"][key] == r["worse"][key]) for r in rows]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy of every aggregate and of the two baselines, each with an interval over prompts.

    Returns:
        {name: {"accuracy", "ci95": [low, high], "n": pairs}}; `longer wins` prefers the response of more tokens and
        `chance` is 0.5 by definition.
    """
    keys = list(rows[0]["better"])
    measured = means_with_intervals([wins(rows, key) for key in keys], [r["prompt"] for r in rows])
    table: dict[str, dict[str, Any]] = {
        "longer wins" if key == "tokens" else key: {"accuracy": mean, "ci95": list(interval), "n": len(rows)}
        for key, (mean, interval) in zip(keys, measured, strict=True)
    }
    table["chance"] = {"accuracy": 0.5, "ci95": [0.5, 0.5], "n": len(rows)}
    return table


@dataclass(frozen=True)
class Pairwise:
    """A measurement: the rows of `score_pairs`, the table of `accuracies`, and what the length limits did."""

    rows: list[dict[str, Any]]
    table: dict[str, dict[str, Any]]
    said: list[str]


def evaluate_pairwise(
    folder: str | Path,
    examples: Sequence[Example],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    per_prompt: int | None = None,
    most: int | None = None,
    trajectory_k: int = 0,
    seed: int = 0,
    bf16: bool = False,
) -> Pairwise:
    """Pairwise accuracy of the value or reward model in `folder`; a reward model is read at the last token only.

    Args:
        per_prompt, most: at most so many pairs of each prompt, and in all (seeded samples).

    Raises:
        InputError: no such model there, or no usable pair in the examples.
    """
    role = models.role_of(folder)
    model: Any = models.load(folder, "reward" if role == "reward" else "value")
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer: Any = models.load_tokenizer(folder)
    encoder = Encoder(tokenizer, examples, max_prompt_tokens, max_response_tokens, trajectory_k, seed)
    picks = preference_picks(examples, per_prompt, seed)
    if most is not None and len(picks) > most:
        picks = random.Random(seed).sample(picks, most)
    encoded = list(encoder.pairs(picks))
    encoder.require_trajectories()
    reads = models.most_tokens(model) or math.inf
    pairs = [pair for pair in encoded if max(map(_length, (pair.better, pair.worse))) <= reads]
    said = encoder.notes.lines()
    if len(pairs) < len(encoded):
        left = f"{len(encoded) - len(pairs)} of {len(encoded)} pairs were left out"
        said.append(f"{left}: longer than the {reads} tokens that the model reads")
    if not pairs:
        why = "; ".join(said) if picks else "no response is preferred to another"
        raise InputError(f"the data has no usable pair ({why}); give preference data that fits the limits")
    aggregates = ["last"] if role == "reward" else AGGREGATES
    rows = score_pairs(model, pairs, tokenizer.pad_token_id, aggregates, bf16)
    return Pairwise(rows, accuracies(rows), said)


def _length(text: Encoded) -> int:
    return len(text.prompt_ids) + len(text.response_ids)
