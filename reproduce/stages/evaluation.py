"""Stages that measure value models."""

import json
from typing import Any

from dvpo.data.formats import read
from dvpo.data.records import load_examples
from dvpo.evaluation.pairwise import evaluate_pairwise
from dvpo.files import atomic_write, write_json
from reproduce.pipeline import Context


def pairwise(ctx: Context) -> dict[str, Any]:
    """Pairwise accuracy of a model. Inputs: model; data (a split folder or a raw source). Settings: see `_examples`,
    max_prompt_tokens, max_response_tokens, per_prompt, most, trajectory_k, bf16, and subfolder of the model's
    folder (PPO keeps its critic in one).
    """
    s = ctx.settings
    examples, said = _examples(ctx)
    found = evaluate_pairwise(
        ctx.inputs["model"] / s.get("subfolder", ""),
        examples,
        max_prompt_tokens=s["max_prompt_tokens"],
        max_response_tokens=s["max_response_tokens"],
        per_prompt=s["per_prompt"],
        most=s["most"],
        trajectory_k=s["trajectory_k"],
        seed=ctx.seed,
        bf16=s["bf16"],
    )
    with atomic_write(ctx.out / "pairs.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in found.rows), encoding="utf-8")
    write_json(ctx.out / "accuracy.json", found.table)
    return {"accuracy": found.table, "pairs": len(found.rows), "said": said + found.said}


def _examples(ctx: Context) -> tuple[list[Any], list[str]]:
    """Settings: split, and format `split` (our own files) or `raw` (any data that `formats.read` knows)."""
    if ctx.settings["format"] == "split":
        return load_examples(ctx.inputs["data"] / f"{ctx.settings['split']}.jsonl"), []
    data = read(ctx.inputs["data"], split=ctx.settings["split"])
    return data.examples, data.notes.lines()
