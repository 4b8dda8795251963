"""What r(x, y) is: from preferences, from the data's scores, or from a reward model."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dvpo.data.pairs import Encoder, Pick
from dvpo.data.records import Example
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.training.gvm import ValueText
from dvpo.values import score_all

Target = Literal["preference", "score", "reward_model"]


def encodable_pairs(
    encoder: Encoder, picks: Sequence[tuple[Pick, Pick]], most: int | None
) -> list[tuple[tuple[Pick, Encoded], tuple[Pick, Encoded]]]:
    """The first `most` pairs of `picks` of which both texts are within the limits."""
    kept: list[tuple[tuple[Pick, Encoded], tuple[Pick, Encoded]]] = []
    for better, worse in picks:
        if most is not None and len(kept) == most:
            break
        texts = encoder.text(better), encoder.text(worse)
        if texts[0] is not None and texts[1] is not None:
            kept.append(((better, texts[0]), (worse, texts[1])))
    return kept


def value_texts(
    pairs: Sequence[tuple[tuple[Pick, Encoded], tuple[Pick, Encoded]]],
    target: Target,
    examples: Sequence[Example],
    reward_model: Any = None,
    pad_id: int = 0,
    bf16: bool = False,
) -> tuple[list[ValueText], dict[str, float]]:
    """Training texts with their rewards, and {"mean", "std"} of the raw rewards.

    Every response is one text. `preference`: +1 or -1, the mean over the pairs that it is in, which has the same
    minimiser as one text for every pair at a fraction of the passes. `score` and `reward_model`: its raw score
    standardised over these texts: (score - mean) / std.

    Raises:
        InputError: a score is missing, or all scores are equal.
    """
    texts = {pick: text for pair in pairs for pick, text in pair}
    if target == "preference":
        outcomes: dict[Pick, list[float]] = {pick: [] for pick in texts}
        for pair in pairs:
            for (pick, _), r in zip(pair, (1.0, -1.0), strict=True):
                outcomes[pick].append(r)
        return [ValueText(texts[p], float(np.mean(r))) for p, r in outcomes.items()], {"mean": 0.0, "std": 1.0}
    if target == "score":
        raw = [_score(examples, pick) for pick in texts]
    else:
        raw = [0.0] * len(texts)
        for i, values_S in score_all(reward_model, list(texts.values()), pad_id, bf16=bf16):
            raw[i] = float(values_S[-1])
    mean, std = float(np.mean(raw)), float(np.std(raw))
    if std == 0:
        raise InputError("all responses have the same score; a value model cannot learn from them")
    rewards = [(r - mean) / std for r in raw]
    return [ValueText(t, r) for t, r in zip(texts.values(), rewards, strict=True)], {"mean": mean, "std": std}


def _score(examples: Sequence[Example], pick: Pick) -> float:
    example = examples[pick.example]
    score = example.responses[pick.response].score
    if score is None:
        raise InputError(f"{example.origin}: a response has no score; use target: preference, or add scores")
    return score
