"""Stages that measure value models."""

import json
import random
from typing import Any

from dvpo import models
from dvpo.data.formats import read
from dvpo.data.pairs import Encoder, preference_picks
from dvpo.data.records import load_examples
from dvpo.evaluation.pairwise import accuracies, score_pairs
from dvpo.files import atomic_write, write_json
from dvpo.objectives.td import AGGREGATES
from reproduce.pipeline import Context


def pairwise(ctx: Context) -> dict[str, Any]:
    """Pairwise accuracy of a model. Inputs: model; data (a split folder or a raw source). Settings: see `_examples`,
    max_prompt_tokens, max_response_tokens, per_prompt, most, trajectory_k, bf16.
    """
    s = ctx.settings
    role = models.role_of(ctx.inputs["model"])
    model = models.load(ctx.inputs["model"], "reward" if role == "reward" else "value")
    tokenizer = models.load_tokenizer(ctx.inputs["model"])
    examples, said = _examples(ctx)
    encoder = Encoder(
        tokenizer, examples, s["max_prompt_tokens"], s["max_response_tokens"], s["trajectory_k"], ctx.seed
    )
    picks = preference_picks(examples, s["per_prompt"], ctx.seed)
    if s["most"] is not None and len(picks) > s["most"]:
        picks = random.Random(ctx.seed).sample(picks, s["most"])
    pairs = list(encoder.pairs(picks))
    aggregates = ["last"] if role == "reward" else AGGREGATES
    rows = score_pairs(model, pairs, tokenizer.pad_token_id, aggregates, s["bf16"])
    with atomic_write(ctx.out / "pairs.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = accuracies(rows)
    write_json(ctx.out / "accuracy.json", table)
    return {"accuracy": table, "pairs": len(pairs), "said": said + encoder.notes.lines()}


def _examples(ctx: Context) -> tuple[list[Any], list[str]]:
    """Settings: split, and format `split` (our own files) or `raw` (any data that `formats.read` knows)."""
    if ctx.settings["format"] == "split":
        return load_examples(ctx.inputs["data"] / f"{ctx.settings['split']}.jsonl"), []
    data = read(ctx.inputs["data"], split=ctx.settings["split"])
    return data.examples, data.notes.lines()
