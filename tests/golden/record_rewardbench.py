"""Records what the rewardbench package says of some made-up wins, to compare ours with.

Run in an environment of its own: pip install rewardbench==0.1.4; python tests/golden/record_rewardbench.py
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section

PAIRS = EXAMPLE_COUNTS | {"math-prm": 447}


def case(subsets: list[str], seed: int) -> dict:
    """Wins of each subset, and the package's scores of the sections that have one."""
    rng = random.Random(seed)
    wins = {subset: rng.randint(0, PAIRS[subset]) for subset in subsets}
    accuracies = {subset: wins[subset] / PAIRS[subset] for subset in subsets}
    scores = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
    return {"wins": wins, "sections": {s: v for s, v in scores.items() if set(SUBSET_MAPPING[s]) & set(subsets)}}


names = list(EXAMPLE_COUNTS)
document = {
    "command": "pip install rewardbench==0.1.4; python tests/golden/record_rewardbench.py",
    "package": f"rewardbench {version('rewardbench')}",
    "weights": EXAMPLE_COUNTS,
    "sections": SUBSET_MAPPING,
    "cases": [
        case(names, 0),
        case(names, 1),
        case([n for n in names if n.startswith(("llmbar", "hep"))], 2),
        case(["math-prm", "hep-go", "donotanswer"], 3),
    ],
}
path = Path(__file__).with_name("rewardbench.json")
path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
