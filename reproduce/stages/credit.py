"""The stage that asks whether token values find the wrong word of an answer, in the atlas world."""

import json
from typing import Any

from dvpo.data.records import load_examples
from dvpo.evaluation.credit import evaluate_credit
from dvpo.files import write_json
from reproduce.pipeline import Context


def credit(ctx: Context) -> dict[str, Any]:
    """Where a model puts the blame, against the judge's wrong words. Inputs: model, data, atlas.

    Settings: split, per_prompt, max_prompt_tokens, max_response_tokens, trajectory_k, subfolder ("critic" for the
    critic that a PPO stage keeps below its policy, else "").
    """
    s = ctx.settings
    table = evaluate_credit(
        ctx.inputs["model"] / s["subfolder"],
        load_examples(ctx.inputs["data"] / f"{s['split']}.jsonl"),
        json.loads((ctx.inputs["atlas"] / "world.json").read_text(encoding="utf-8")),
        per_prompt=s["per_prompt"],
        max_prompt_tokens=s["max_prompt_tokens"],
        max_response_tokens=s["max_response_tokens"],
        seed=ctx.seed,
        trajectory_k=s.get("trajectory_k", 0),
    )
    write_json(ctx.out / "credit.json", table)
    return table
