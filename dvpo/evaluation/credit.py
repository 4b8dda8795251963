"""How well token values point at the wrong token of an answer, where the truth is known.

The action value of token t is Q_t = h_t and the value before it is V_t = h_{t-1}, so its step is h_t - h_{t-1}: what
the model says that this token did to the answer. A good model steps down at a wrong token. EOS counts nowhere.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvpo import models
from dvpo.data.atlas_score import Judge
from dvpo.data.pairs import Encoder, Pick
from dvpo.data.records import Example
from dvpo.errors import InputError, in_row
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.values import score_all

Floats = NDArray[np.float64]
Reading = Literal["value steps", "spread score"]
RESAMPLES = 500


@dataclass(frozen=True)
class Marked:
    """A response with its truth.

    values: h_0..h_T, [S]; the response's last token is EOS.
    wrong: the indices of the response tokens that make a statement wrong.
    group: the prompt, for intervals; responses of one prompt are drawn together.
    """

    values: Tensor
    wrong: tuple[int, ...]
    group: int


def evaluate_credit(
    folder: str | Path,
    examples: Sequence[Example],
    world: dict[str, Any],
    *,
    per_prompt: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    seed: int,
    trajectory_k: int = 0,
) -> dict[str, Any]:
    """Where a model puts the blame, against the judge's wrong words.

    Args:
        folder: a GVM, critic or ScalarRM of the built-in world, whose tokenizer has a token per word, so that a wrong
            word's index is its token's.
        world: what `Atlas.to_json` gives.
        per_prompt: responses of each example, a seeded choice.
        trajectory_k: question-answer pairs of the same policy that are put before each prompt (tau).

    Returns:
        What `credit_table` gives, with "reading" and "left_out", the responses over a length limit.

    Raises:
        InputError: not one token per word, or no wrong word at all.
    """
    role = models.role_of(folder)
    model: Any = models.load(folder, "reward" if role == "reward" else "value")
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer: Any = models.load_tokenizer(folder)
    encoder = Encoder(tokenizer, examples, max_prompt_tokens, max_response_tokens, trajectory_k, seed)
    judge, rng = Judge(world), random.Random(seed)
    texts, truths, left_out = [], [], 0
    for i, example in enumerate(examples):
        n = len(example.responses)
        for j in sorted(rng.sample(range(n), min(per_prompt, n))):
            words = example.responses[j].text
            text = encoder.text(Pick(i, j))
            if text is None or text.response_ids[-1] != tokenizer.eos_token_id:
                left_out += 1
                continue
            if len(text.response_ids) != len(words.split()) + 1:
                raise InputError(
                    f"{example.origin}: response {j} has not one token per word; give a model of the built-in world"
                )
            texts.append(text)
            with in_row(example.origin):
                truths.append(
                    (judge.judge(example.prompt[-1]["content"], words).wrong_words, encoder.prompt_numbers[i])
                )
    encoder.require_trajectories()
    if not any(wrong for wrong, _ in truths):
        raise InputError("no chosen answer has a wrong word; take more of them")
    values = dict(score_all(model, texts, tokenizer.pad_token_id))
    marked = [Marked(values[k], *truth) for k, truth in enumerate(truths)]
    reading: Reading = "spread score" if role == "reward" else "value steps"
    return {"reading": reading, **credit_table(marked, reading), "left_out": left_out}


def steps(values_S: Tensor) -> Tensor:
    """Q_t - V_t = h_t - h_{t-1} of every response token. [T]."""
    return values_S[1:] - values_S[:-1]


def auroc(scores: Sequence[float] | Floats, labels: Sequence[bool] | NDArray[np.bool_]) -> float:
    """The probability that a wrong token (label true) has a lower score than a right one, ties counting half.

    Raises ValueError where one of the two classes is empty.
    """
    wrong = np.asarray(labels, dtype=bool)
    n_wrong, n_right = int(wrong.sum()), int((~wrong).sum())
    if not n_wrong or not n_right:
        raise ValueError(f"an AUROC needs both classes; there are {n_wrong} wrong and {n_right} right tokens")
    _, place, counts = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    above = midranks[place[wrong]].sum() - n_wrong * (n_wrong + 1) / 2
    return float(1 - above / (n_wrong * n_right))


def lowest_hit(step_rows: Sequence[Floats], wrong_rows: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
    """Of every response with a wrong token: whether its lowest step falls on one, and the chance of that.

    Where several tokens share the lowest step, the hit is the share of them that are wrong. The chance is that of a
    token drawn at random: wrong tokens / tokens.
    """
    hits, chances = [], []
    for row, wrong in zip(step_rows, wrong_rows, strict=True):
        if wrong:
            is_wrong = _mask(wrong, len(row))
            hits.append(float(is_wrong[row == row.min()].mean()))
            chances.append(float(is_wrong.mean()))
    return hits, chances


def credit_table(responses: Sequence[Marked], reading: Reading) -> dict[str, Any]:
    """Both measures over many responses, with 95 % bootstrap intervals over prompts.

    Args:
        reading: `value steps` for a GVM or a critic. `spread score` for a ScalarRM: every token gets h_T / T, so that
            tokens of one response are equal and the AUROC only says which responses are bad.

    Returns:
        {"auroc", "auroc_ci95", "lowest_hit", "lowest_hit_ci95", "lowest_chance", "n_responses", "n_wrong_tokens"};
        the lowest-step numbers are over the responses with a wrong token.

    Raises:
        ValueError: no wrong token or no right one, or a wrong index outside its response.
    """
    rows = [_scores(r.values, reading) for r in responses]
    labels = [_mask(r.wrong, len(row)) for r, row in zip(responses, rows, strict=True)]
    scores = np.concatenate(rows) if rows else np.empty(0)
    wrong = np.concatenate(labels) if labels else np.empty(0, dtype=bool)
    found = auroc(scores, wrong)
    hits, chances = lowest_hit(rows, [r.wrong for r in responses])
    hit, hit_interval = mean_with_interval(hits, [r.group for r in responses if r.wrong], RESAMPLES)
    owners = np.repeat([r.group for r in responses], [len(row) for row in rows])
    return {
        "auroc": found,
        "auroc_ci95": _auroc_interval(scores, wrong, owners),
        "lowest_hit": hit,
        "lowest_hit_ci95": list(hit_interval),
        "lowest_chance": float(np.mean(chances)),
        "n_responses": len(responses),
        "n_wrong_tokens": int(wrong.sum()),
    }


def _scores(values_S: Tensor, reading: Reading) -> Floats:
    """The score of every token but EOS."""
    values = values_S.double()
    if reading == "value steps":
        return steps(values)[:-1].numpy()
    count = len(values) - 2
    return np.full(count, float(values[-1]) / max(count, 1))


def _mask(wrong: Sequence[int], length: int) -> NDArray[np.bool_]:
    """True at the wrong tokens."""
    if any(not 0 <= t < length for t in wrong):
        raise ValueError(f"wrong tokens {tuple(wrong)} in a response of {length} tokens before EOS")
    mask = np.zeros(length, dtype=bool)
    mask[list(wrong)] = True
    return mask


def _auroc_interval(scores: Floats, wrong: NDArray[np.bool_], owners: NDArray[np.int64]) -> list[float]:
    """95 % percentile interval over resampled groups; draws that lack a class are left out.

    A draw is a weight per group, so the tokens are ranked once: with the right tokens' weight summed up to each
    distinct score, every wrong token wins the weight above its score and half of that at it.
    """
    place = np.unique(scores, return_inverse=True)[1]
    _, owner = np.unique(owners, return_inverse=True)
    n_groups, n_places = int(owner.max()) + 1, int(place.max()) + 1
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        weights = np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups).astype(np.float64)[owner]
        right_at = np.bincount(place[~wrong], weights[~wrong], n_places)
        above = right_at.sum() - np.cumsum(right_at) + right_at / 2
        total = weights[wrong].sum() * right_at.sum()
        if total:
            found.append((weights[wrong] * above[place[wrong]]).sum() / total)
    low, high = np.percentile(found, [2.5, 97.5])
    return [float(low), float(high)]
