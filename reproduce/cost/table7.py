"""Table 7's sixteen cells from the cost model: three constants fitted on eight cells, the other eight predicted.

Fitted on: the PPO and DVPO rows; predicted: ReMax and GRPO. The paper describes the first two in words (Appendix F:
which models each loads and trains), they differ by one trained model, and both sizes are in either half. The choice of
rows fell before any error of the model was seen; the cells themselves were known.

Readings of the paper are choices beside the three constants. They, and the measured cost of stage 3's hooks, were
settled after the errors of some combinations had been seen on all cells, so the predicted half is not untouched:
- GB are 2^30 bytes, as torch counts; 4 prompts on each of the 8 devices (Appendix F), in passes of 2, with one
  optimiser step an epoch and 4 epochs (Appendix C).
- Frozen models lie whole on every device, at 8B too. Sharded ones would give a far lower memory at 8B, and another
  ratio of PPO to DVPO.
- Under stage 3 the policy generates with its weights gathered for every token; activations are recomputed.
- GRPO generates and judges 5 responses a prompt and learns from as many as the others: Table 6 gives it c_back.
- Prompts of 180 tokens: our assumption; utilisation takes up what is wrong in it.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from reproduce import paper
from reproduce.cost import hardware, memory, timing
from reproduce.cost.hardware import GIB
from reproduce.cost.shapes import SHAPES
from reproduce.cost.work import METHODS, Job, Setup

FITTED_METHODS = ("PPO", "DVPO")
MODELS = {"Llama3.2-3B-Base": ("llama-3.2-3b", 1), "Llama3-8B-Base": ("llama-3-8b", 3)}
PROMPT_TOKENS = 180
GOAL = 0.15
MISSES = {
    ("Llama3.2-3B-Base", "ReMax", "time (s)"): (
        "By the table itself one greedy rollout and its score would cost ReMax 31 s more than DVPO's whole update of "
        "13 s, but 18 s at 8B: no account of compute gives both. Greedy answers of a base model that never end (1024 "
        "tokens take about 24 s here) would."
    ),
    ("Llama3-8B-Base", "GRPO", "time (s)"): (
        "Reading five times the texts costs 21 s more here (17 in judging, 4 in prompts), at the utilisation of "
        "learning; the table has 10 s. Larger batches in judging than in learning would do."
    ),
}
"""Why a cell is out of reach, where it is."""


@dataclass(frozen=True)
class Constants:
    """response_tokens: padded length of a rollout. utilisation: share of the best arithmetic. slack: see `memory`.

    The length and the host's costs per token cannot be told apart here, nor the utilisation and the prompts' length:
    read them as what this model needs to give the table, not as measurements.
    """

    response_tokens: float
    utilisation: float
    slack: float


def setup_of(model: str) -> tuple[str, Setup]:
    """The shape's name and the set-up of one of the table's models."""
    shape, zero = MODELS[model]
    return shape, Setup(zero=zero, checkpointing=True, gathered=False)


def predict(model: str, method: str, metric: str, constants: Constants) -> float:
    """A cell: GB or seconds."""
    name, setup = setup_of(model)
    group = 5 if method == "GRPO" else 1
    job = Job(METHODS[method.lower()], PROMPT_TOKENS, constants.response_tokens, 4, 2, epochs=4, group=group, learned=1)
    cluster = hardware.CLUSTERS["8xa100-80gb"]
    if metric == "memory (GB)":
        return memory.peak(memory.phases(job, SHAPES[name], setup, cluster, constants.slack))[1] / GIB
    return sum(timing.seconds(job, SHAPES[name], setup, cluster, constants.utilisation).values())


@functools.cache
def constants() -> Constants:
    """The three constants: least squares of the logarithms of predicted over printed, on the fitted rows."""
    import numpy as np

    cells = [c for c in _cells() if c.method in FITTED_METHODS]

    def residuals(x: Any) -> Any:
        now = Constants(*np.exp(x))
        return np.array([math.log(predict(c.model, c.method, c.metric, now) / float(c.value)) for c in cells])

    x = np.log([150.0, 0.1, 1.2])
    best = residuals(x)
    damping = 1e-2
    for _ in range(100):  # Levenberg-Marquardt
        slopes = np.stack([(residuals(x + step) - best) / 1e-5 for step in 1e-5 * np.eye(3)], axis=1)
        square = slopes.T @ slopes
        move = -np.linalg.solve(square + damping * np.diag(np.diag(square)), slopes.T @ best)
        tried = residuals(x + move)
        if tried @ tried < best @ best:
            x, best, damping = x + move, tried, damping / 3
            if abs(move).max() < 1e-9:
                break
        else:
            damping *= 3
    return Constants(*map(float, np.exp(x)))


def table_7_predictions() -> list[dict[str, Any]]:
    """Rows {cell: {model, method, metric}, paper, predicted, fitted, error, within, reason}.

    error: (predicted - paper) / paper. reason: why a cell is missed by more than the goal of 15 %, else None.
    """
    found = constants()
    rows = []
    for c in _cells():
        printed = float(c.value)
        predicted = predict(c.model, c.method, c.metric, found)
        error = predicted / printed - 1
        within = abs(error) <= GOAL
        rows.append({
            "cell": {"model": c.model, "method": c.method, "metric": c.metric},
            "paper": printed,
            "predicted": round(predicted, 2),
            "fitted": c.method in FITTED_METHODS,
            "error": round(error, 4),
            "within": within,
            "reason": None if within else MISSES.get((c.model, c.method, c.metric), "not explained"),
        })  # fmt: skip
    return rows


def _cells() -> list[paper.Cell]:
    return [c for c in paper.cells(7) if c.method != "change"]
