"""RewardBench (Lambert et al. 2024): how often a model scores the chosen answer above the rejected one.

23 subsets make up four sections. A section is the mean of its subsets weighted by their pairs, math-prm by 984 in place
of its 447, so that it weighs as much as the six code subsets together. A tie is a loss. No answer is cut: a pair with a
text over the model's length is not scored but counted, and what lacks a pair is named a part of its subset, section and
benchmark. Two deviations from the `rewardbench` package: an answer ends with EOS, as in training, instead of with what
the chat template writes after it, and a tie in length is a loss of "longer wins" too.
"""

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvpo import models
from dvpo.data.splits import brief, data_files, hub_rows, is_hub_id, listed
from dvpo.data.templates import Encoded, encode
from dvpo.errors import InputError, StageError
from dvpo.files import sha256_file, sha256_json
from dvpo.objectives.td import AGGREGATES, aggregate
from dvpo.values import score_all

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 447,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""The pairs of every subset, by section."""
PAIRS = {subset: n for subsets in SECTIONS.values() for subset, n in subsets.items()}
WEIGHTS = PAIRS | {"math-prm": 984}
SPLIT = "filtered"
RESAMPLES = 2000
_FIELDS = ("prompt", "chosen", "rejected", "subset")
_LONGER = "longer wins"


@dataclass(frozen=True, slots=True)
class Pair:
    """One row. `name` is its id in the data, or its place."""

    prompt: str
    chosen: str
    rejected: str
    subset: str
    name: str


@dataclass
class Data:
    """The pairs of a source, what was left out of it, and the digest of its bytes (of the hub: its id and split)."""

    pairs: list[Pair]
    digest: str
    notes: list[str] = field(default_factory=list)


def read_pairs(source: str | Path, split: str | None = None) -> Data:
    """Reads RewardBench, or parts of it, from a file, a folder of files, or the hub (`owner/name@REV`).

    Rows have the fields of allenai/reward-bench: prompt, chosen, rejected, subset, and id where there is one. Without
    `split` it is "filtered" on the hub, and in a folder where a file is named so. A file whose first row has neither
    chosen nor rejected is left out and noted.

    Raises:
        InputError: nothing there, a malformed row, an unknown subset, or more pairs than a subset has.
    """
    path = Path(source)
    if path.exists():
        if split is None and path.is_dir() and any(SPLIT in f.name for f in path.iterdir()):
            split = SPLIT
        data = _from_files(data_files(path, split))
    elif is_hub_id(name := str(source)):
        split = split or SPLIT
        rows = hub_rows(name, split)
        data = Data([_pair(f"{name}:{n}", row) for n, row in enumerate(rows, 1)], sha256_json([name, split]))
    else:
        raise InputError(f"{source} is no file or folder; give one, or a hub id as owner/name@REV")
    if not data.pairs:
        raise InputError(f"{source} has no rows with {', '.join(_FIELDS)}; give RewardBench or a part of it")
    for subset, n in Counter(pair.subset for pair in data.pairs).items():
        if n > PAIRS[subset]:
            raise InputError(
                f"{source} has {n} pairs of {subset} and RewardBench {PAIRS[subset]}; name one file, or split {SPLIT}"
            )
    return data


def _from_files(files: Sequence[Path]) -> Data:
    data = Data([], sha256_json({file.name: sha256_file(file) for file in files}))
    for file in files:
        for place, row in _rows(file):
            if isinstance(row, dict) and "chosen" not in row and "rejected" not in row:
                data.notes.append(f"{file.name} was left out: its rows are no pairs (no chosen, no rejected)")
                break
            data.pairs.append(_pair(place, row))
    return data


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a .jsonl, .jsonl.gz or .parquet file."""
    if file.suffix == ".parquet":
        yield from ((f"{file.name}:row {number}", row) for number, row in enumerate(_parquet(file), 1))
        return
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield (place := f"{file.name}:{number}"), _decoded(place, line)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({brief(error)}); fetch it again") from error


def _parquet(file: Path) -> list[Any]:
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as parquet ({brief(error)}); fetch it again") from error


def _decoded(place: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: the line is not JSON ({brief(error)}); mend or remove it") from error


def _pair(place: str, row: Any) -> Pair:
    fields: dict[str, Any] = {name: row.get(name) if isinstance(row, dict) else None for name in _FIELDS}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise InputError(f'{place}: field "{name}" is missing or no text; mend or remove the row')
    if fields["subset"] not in PAIRS:
        raise InputError(
            f'{place}: "{fields["subset"]}" is none of the {len(PAIRS)} subsets ({listed(PAIRS)}); mend the row'
        )
    return Pair(**fields, name=str(row.get("id", place)))


def score_texts(
    model: Any, texts: Sequence[Encoded], pad_id: int, aggregates: Sequence[str], bf16: bool = False
) -> list[dict[str, float]]:
    """Per text {aggregate: score, _LONGER: tokens of the response}.

    Texts run one at a time: in a batch the last bits of a score depend on its company, and a tie is a loss.
    """
    scores: list[dict[str, float]] = [{} for _ in texts]
    for i, values_S in score_all(model, texts, pad_id, max_tokens=1, bf16=bf16):
        mask_1_S = torch.ones(1, len(values_S), dtype=torch.bool)
        scores[i] = {how: float(aggregate(values_S[None], mask_1_S, how)) for how in aggregates}
        scores[i][_LONGER] = len(texts[i].response_ids)
    return scores


def evaluate_rewardbench(folder: str | Path, pairs: Sequence[Pair], bf16: bool = False) -> dict[str, Any]:
    """RewardBench of the value model (every aggregate) or scalar reward model (its score, `last`) in `folder`.

    Returns:
        What `summary` gives, with "too_long": {"count", "limit": tokens of the model, "rows": their names}, and "rows":
        one per scored pair {"id", "subset", "chosen", "rejected"} with the scores of both answers.

    Raises:
        InputError: no such model there, or no pair fits it. StageError: a value is not finite.
    """
    reward = models.role_of(folder) == "reward"
    model: Any = models.load(folder, "reward" if reward else "value")
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer = models.load_tokenizer(folder)
    limit = models.most_tokens(model)
    fitting, texts, too_long = [], [], []
    for pair in pairs:
        prompt = [{"role": "user", "content": pair.prompt}]
        both = [encode(tokenizer, prompt, answer) for answer in (pair.chosen, pair.rejected)]
        if limit is not None and max(len(t.prompt_ids) + len(t.response_ids) for t in both) > limit:
            too_long.append(pair.name)
            continue
        fitting.append(pair)
        texts += both
    if not fitting:
        raise InputError(f"no pair fits the {limit} tokens of the model in {folder}; give pairs or a model that fit")
    scores = score_texts(model, texts, tokenizer.pad_token_id, ["last"] if reward else AGGREGATES, bf16)
    rows = []
    for pair, chosen, rejected in zip(fitting, scores[::2], scores[1::2], strict=True):
        if not all(map(math.isfinite, (*chosen.values(), *rejected.values()))):
            raise StageError(f"{folder}: the score of pair {pair.name} is not finite")
        rows.append({"id": pair.name, "subset": pair.subset, "chosen": chosen, "rejected": rejected})
    groups = [pair.prompt for pair in fitting]
    return {
        **summary(rows, groups),
        "too_long": {"count": len(too_long), "limit": limit, "rows": too_long},
        "rows": rows,
    }


def summary(rows: Sequence[dict[str, Any]], prompts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Accuracies of subsets, sections and, where all of it is there, the benchmark, each with a 95 % interval.

    Intervals come from resampling the prompts of every subset by itself.

    Args:
        rows: {"subset", "chosen": {name: score}, "rejected": {name: score}}. prompts: the prompt of every row.

    Returns:
        {"benchmark", "missing_subsets", "subsets", "sections", "average"}. An entry of `subsets` and `sections` has
        "label" (its name, or "part of" it), "pairs", "of" and "accuracy": {name: {"accuracy", "ci95"}} with the
        baselines "longer wins" and "chance"; `average` is the plain mean of four whole sections, else None.
    """
    names = list(rows[0]["chosen"])
    rng = np.random.default_rng(seed)
    subsets: dict[str, dict[str, Any]] = {}
    means: dict[str, np.ndarray] = {}
    for subset in PAIRS:
        mine = [i for i, row in enumerate(rows) if row["subset"] == subset]
        if mine:
            won_K_N = np.array([[rows[i]["chosen"][k] > rows[i]["rejected"][k] for i in mine] for k in names], float)
            means[subset] = _resampled(won_K_N, [prompts[i] for i in mine], rng)
            subsets[subset] = _entry(subset, len(mine), PAIRS[subset], names, means[subset])
    sections: dict[str, dict[str, Any]] = {}
    section_means = []
    for section, official in SECTIONS.items():
        there = [subset for subset in official if subset in subsets]
        if there:
            weights = np.array([WEIGHTS[subset] for subset in there], float)
            means_K_R = np.tensordot(weights / weights.sum(), np.stack([means[subset] for subset in there]), 1)
            pairs = sum(subsets[subset]["pairs"] for subset in there)
            sections[section] = _entry(section, pairs, sum(official.values()), names, means_K_R)
            section_means.append(means_K_R)
    whole = len(rows) == sum(PAIRS.values())
    return {
        "benchmark": "RewardBench" if whole else "part of RewardBench",
        "missing_subsets": [subset for subset in PAIRS if subset not in subsets],
        "subsets": subsets,
        "sections": sections,
        "average": _accuracies(names, np.mean(section_means, axis=0)) if whole else None,
    }


def _resampled(won_K_N: np.ndarray, prompts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """The mean of every row, then its means in resamples of whole prompts. [K, 1 + R]."""
    index = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)[1]
    sums_K_G = np.stack([np.bincount(index, weights=won) for won in won_K_N])
    counts_G = np.bincount(index)
    draw_R_G = rng.integers(0, counts_G.size, (RESAMPLES, counts_G.size))
    means_K_R = sums_K_G[:, draw_R_G].sum(2) / counts_G[draw_R_G].sum(1)
    return np.concatenate([won_K_N.mean(1, keepdims=True), means_K_R], axis=1)


def _entry(name: str, pairs: int, of: int, names: Sequence[str], means_K_R: np.ndarray) -> dict[str, Any]:
    label = name if pairs == of else f"part of {name}"
    return {"label": label, "pairs": pairs, "of": of, "accuracy": _accuracies(names, means_K_R)}


def _accuracies(names: Sequence[str], means_K_R: np.ndarray) -> dict[str, dict[str, Any]]:
    low_K, high_K = np.percentile(means_K_R[:, 1:], [2.5, 97.5], axis=1)
    table = {
        name: {"accuracy": float(mean), "ci95": [float(low), float(high)]}
        for name, mean, low, high in zip(names, means_K_R[:, 0], low_K, high_K, strict=True)
    }
    return table | {"chance": {"accuracy": 0.5, "ci95": [0.5, 0.5]}}
