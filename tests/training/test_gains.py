"""What the training loop's savings save, on a real model.

`DVPO_SMOLLM2=FOLDER pytest -m slow -s tests/training/test_gains.py` prints it.
That they change nothing is tested elsewhere for every change; here it is checked once more, and the gain is printed.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dvpo import logprobs, models
from dvpo.batching import buckets
from dvpo.data.templates import Encoded
from dvpo.values import collate, token_values
from reproduce import process_memory

SMOLLM2 = os.environ.get("DVPO_SMOLLM2")
ROUNDS = 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SMOLLM2 is None, reason="DVPO_SMOLLM2 names no folder with SmolLM2-135M-Instruct"),
]


def answers(count: int) -> list[Encoded]:
    """Texts whose lengths differ as those of sampled answers do."""
    rng = random.Random(0)
    return [
        Encoded(rng.choices(range(100, 40_000), k=rng.randint(20, 80)), rng.choices(range(100, 40_000), k=length))
        for length in (min(256, 16 + int(rng.expovariate(1 / 60))) for _ in range(count))
    ]


def compare(what: str, ways: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Seconds (medians of rounds in turns) and the peak's growth in MB of every way, printed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    grown: dict[str, float] = {}
    for number in range(ROUNDS + 1):
        for name, run in ways.items():
            process_memory.reset_peak()
            before, began = process_memory.resident_bytes(), time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
                grown[name] = max(grown.get(name, 0.0), (process_memory.peak_bytes() - before) / 2**20)
    found = {name: (statistics.median(seconds[name]), grown[name]) for name in ways}
    print(f"\n{what}: " + "; ".join(f"{name} {s:.2f} s, {mb:.0f} MB" for name, (s, mb) in found.items()))
    return found


def test_logprobs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """49,152 tokens in the vocabulary, forward and backward pass of 8 answers."""
    assert SMOLLM2 is not None
    model: Any = models.load(SMOLLM2, "policy")
    batch = collate(answers(8), 0)
    chunk = logprobs.MOST_LOGITS

    def run(most: int) -> torch.Tensor:
        monkeypatch.setattr(logprobs, "MOST_LOGITS", most)
        model.zero_grad()
        found: torch.Tensor = logprobs.response_logprobs(model, batch, 1.0)
        found.sum().backward()
        return found.detach()

    assert (run(chunk) - run(2**62)).abs().max() < 1e-4
    found = compare("log-probabilities", {"in chunks": lambda: run(chunk), "whole": lambda: run(2**62)})
    assert found["in chunks"][1] < 0.8 * found["whole"][1]


def test_texts_of_like_length_together() -> None:
    """One pass of a value model over 24 answers, 4 at a time."""
    assert SMOLLM2 is not None
    model: Any = models.load(SMOLLM2, "value", fresh_head=True).eval()
    texts = answers(24)
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in texts]
    plans = {"of like length": buckets(lengths, 4), "as they come": [list(range(i, i + 4)) for i in range(0, 24, 4)]}
    computed = {name: sum(len(p) * max(lengths[i] for i in p) for p in plan) for name, plan in plans.items()}

    def run(plan: list[list[int]]) -> None:
        with torch.inference_mode():
            for places in plan:
                token_values(model, collate([texts[i] for i in places], 0))

    found = compare("values", {name: lambda plan=plan: run(plan) for name, plan in plans.items()})
    print(f"tokens computed of {sum(lengths)}: {computed}")
    assert sorted(i for places in plans["of like length"] for i in places) == list(range(24))
    assert computed["of like length"] < 0.9 * computed["as they come"]
    assert found["of like length"][0] < found["as they come"][0]
