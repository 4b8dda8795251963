"""Records what the alpaca_eval package makes of synthetic outputs and annotations, to compare ours with.

Run in an environment of its own: pip install alpaca_eval==0.6.6; python tests/golden/record_alpaca_eval.py
"""

import json
import math
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from alpaca_eval.annotators import PairwiseAnnotator
from alpaca_eval.completion_parsers import logprob_parser
from alpaca_eval.metrics import get_winrate, glm_winrate

N = 60
rng = random.Random(0)


def gamed_rows() -> list[dict]:
    """Two made-up models that were told to be short and to be long, as df_gamed.csv holds them."""
    difficulty = [round(rng.gauss(0, 1), 3) for _ in range(N)]
    return [
        {
            "model": name,
            "preference": round(1 / (1 + math.exp(-(sign + difficulty[i]))), 3),
            "index": i,
            "instruction_difficulty": difficulty[i],
            "std_delta_len": round(rng.gauss(2 * sign, 0.5), 3),
            "not_gamed_baseline": False,
        }
        for name, sign in (("concise", -0.5), ("verbose", 0.5))
        for i in range(N)
    ]


def annotations(indices: list[int], length_bias: float, skill: float, unjudged: int) -> list[dict]:
    """Preferences of a judge that likes long outputs; the first `unjudged` have none, the next is a draw."""
    made = []
    for number, i in enumerate(indices):
        baseline_length, policy_length = rng.randint(100, 1500), rng.randint(100, 3000)
        better = length_bias * (policy_length - baseline_length) / 1000 + skill + rng.gauss(0, 1)
        preference = round(1 + 1 / (1 + math.exp(-better)), 4)
        made.append({
            "index": i,
            "preference": None if number < unjudged else 1.5 if number == unjudged else preference,
            "baseline_length": baseline_length,
            "policy_length": policy_length,
        })  # fmt: skip
    return made


def scores(rows: list[dict], gamed: Path) -> dict:
    """The package's own numbers."""
    frame = pd.DataFrame(rows)
    frame["output_1"] = ["x" * n for n in frame.pop("baseline_length")]
    frame["output_2"] = ["y" * n for n in frame.pop("policy_length")]
    frame["generator_1"], frame["generator_2"] = "baseline", "model"
    glm_winrate.hf_hub_download = lambda **_: str(gamed)
    controlled = glm_winrate.get_length_controlled_winrate(frame.copy(), save_weights_dir=None)
    return {k: float(v) for k, v in (get_winrate(frame) | controlled).items()}


def switched(instructions: list[str]) -> list[bool]:
    """Whether the package shows the policy's output first."""
    annotator = PairwiseAnnotator(annotators_config="weighted_alpaca_eval_gpt4_turbo", caching_path=None)
    (single,) = annotator.annotators.values()
    (processor,) = (p for p in single.processors if type(p).__name__ == "RandomSwitchTwoColumnsProcessor")
    frame = pd.DataFrame({"instruction": instructions, "output_1": "baseline", "output_2": "policy"})
    return (processor.preprocess(frame)["output_1"] == "policy").tolist()


def parsed(top: dict[str, float]) -> float | None:
    """The package's preference, 1 (m) to 2 (M), of a first token's likeliest tokens."""
    content = [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}]
    (value,) = logprob_parser({"logprobs": {"content": content}}, "m", ["m", "M"], is_binarize=False)
    return None if math.isnan(value) else float(value)


instructions = [f"Instruction number {i}: say {word}." for i, word in enumerate(["this", "that", "these", "those"] * 5)]
tops = [
    {"m": -0.1, "M": -2.5, "Both": -9.0},
    {"M": -0.0176, "m": -4.0488},
    {"M": -0.5, "The": -1.0},
    {"m": -3.0, "I": -0.1},
    {"I": -0.1, "The": -3.0},
]
with tempfile.TemporaryDirectory() as folder:
    csv = Path(folder) / "df_gamed.csv"
    pd.DataFrame(gamed_rows()).to_csv(csv, index=False)
    whole = annotations(list(range(N)), length_bias=1.5, skill=-0.3, unjudged=0)
    part = annotations(sorted(rng.sample(range(N), 40)), length_bias=0.2, skill=0.8, unjudged=3)
    document = {
        "command": "pip install alpaca_eval==0.6.6; python tests/golden/record_alpaca_eval.py",
        "package": f"alpaca_eval {version('alpaca_eval')}",
        "with": [f"{name} {version(name)}" for name in ("scikit-learn", "pandas", "numpy", "patsy")],
        "gamed_csv": csv.read_text(encoding="utf-8"),
        "cases": [{"annotations": rows, "scores": scores(rows, csv)} for rows in (whole, part)],
        "instructions": instructions,
        "switched": switched(instructions),
        "logprobs": [{"top": top, "preference": parsed(top)} for top in tops],
    }
path = Path(__file__).with_name("alpaca_eval.json")
path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
