"""How far bfloat16 arithmetic takes the online loop from float32 over 50 updates, beside what another seed does.

Weights, optimiser state and losses are float32 in both; bfloat16 is the arithmetic of the passes (autocast). The table
is printed; run with `-s` to see it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo import models
from dvpo.config import Dvpo, PolicySettings
from dvpo.logprobs import response_logprobs
from dvpo.training.policy import Frozen, OnlineTrainer
from dvpo.values import collate

UPDATES, EVERY = 50, 10


def settings(bf16: bool) -> PolicySettings:
    return PolicySettings(
        algorithm=Dvpo(estimator="gae"),
        learning_rate=1e-4,
        updates=UPDATES,
        prompts_per_update=4,
        minibatch_size=4,
        epochs=2,
        max_new_tokens=12,
        bf16=bf16,
    )


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(one: torch.Tensor, other: torch.Tensor, start: torch.Tensor) -> float:
    """The distance of two trained policies by how far the first has moved."""
    return float((one - other).norm() / (one - start).norm())


@pytest.mark.slow
def test_bfloat16_drifts_less_than_another_seed(checkpoints, examples, texts) -> None:
    prompts = [e.prompt for e in examples]
    frozen = Frozen(value=checkpoints["llama", "value"])
    start: Path = checkpoints["llama", "policy"]

    def trainer(bf16: bool, seed: int) -> OnlineTrainer:
        return OnlineTrainer(start, frozen, prompts, settings(bf16), seed)

    trainers = {"float32": trainer(False, 0), "bfloat16": trainer(True, 0), "seed": trainer(False, 1)}
    origin = flat(models.load(start, "policy"))
    batch = collate(texts, 0)
    rows = []
    for update in range(1, UPDATES + 1):
        values = {name: t.step()["value"] for name, t in trainers.items()}
        if update % EVERY and update != 1:
            continue
        weights = {name: flat(t.policy) for name, t in trainers.items()}
        with torch.no_grad():
            logprobs = {name: response_logprobs(t.policy.eval(), batch, 1.0) for name, t in trainers.items()}
        rows.append(
            {
                "update": update,
                "weights": apart(weights["float32"], weights["bfloat16"], origin),
                "weights, other seed": apart(weights["float32"], weights["seed"], origin),
                "logprobs": float((logprobs["float32"] - logprobs["bfloat16"])[batch.mask_B_S[:, 1:]].abs().mean()),
                "logprobs, other seed": float(
                    (logprobs["float32"] - logprobs["seed"])[batch.mask_B_S[:, 1:]].abs().mean()
                ),
                "value": values["float32"],
                "value, bfloat16": values["bfloat16"],
            }
        )
    print("\n" + "  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}.4g}" for name, value in row.items()))
    assert all(weight.dtype == torch.float32 for weight in trainers["bfloat16"].policy.parameters())
    assert 0 < rows[0]["weights"] < 0.5 * rows[0]["weights, other seed"]
    assert rows[-1]["weights"] < rows[-1]["weights, other seed"]
    assert rows[-1]["logprobs"] < rows[-1]["logprobs, other seed"]
