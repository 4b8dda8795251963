"""Run by test_vllm.py in an environment of its own: what a vLLM engine says for an old policy and then for a new one.

vllm_script.py FOLDER PROMPTS.json OUT.json [URL]      FOLDER holds `old` and `new`; with a URL the engine is a server
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpo.rollout import Engine
from dvpo.rollout.vllm import VllmEngine
from dvpo.rollout.vllm_server import VllmServerEngine

LIMIT, TEMPERATURE = 12, 0.8


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def observe(engine: Engine, policy: Any, new: Any, prompts: list[list[int]]) -> dict[str, Any]:
    seeds = list(range(len(prompts)))
    with engine.awake():
        samples = engine.sample(prompts, seeds)
        seen: dict[str, Any] = {
            "old": engine.greedy(prompts),
            "samples": [s.token_ids for s in samples],
            "logprobs": [s.logprobs for s in samples],
            "backwards": [s.token_ids for s in engine.sample(prompts[::-1], seeds[::-1])][::-1],
            "other_seeds": [s.token_ids for s in engine.sample(prompts, [s + 100 for s in seeds])],
        }
    policy.load_state_dict(new.state_dict())
    with engine.awake():
        seen["new"] = engine.greedy(prompts)
    return seen


if __name__ == "__main__":
    folder, prompts, out = map(Path, sys.argv[1:4])
    policy, tokenizer = load(folder / "old"), AutoTokenizer.from_pretrained(folder / "old")
    common: dict[str, Any] = {"max_new_tokens": LIMIT, "temperature": TEMPERATURE}
    engine: Engine
    if sys.argv[4:]:
        engine = VllmServerEngine(policy, tokenizer, sys.argv[4], folder / "passed-on", **common)
    else:
        options = {"dtype": "float32", "enforce_eager": True}
        engine = VllmEngine(policy, tokenizer, folder / "old", max_tokens=128, options=options, **common)
    seen = observe(engine, policy, load(folder / "new"), json.loads(prompts.read_text()))
    out.write_text(json.dumps(seen | {"limit": LIMIT, "temperature": TEMPERATURE}))
