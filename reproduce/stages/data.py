"""Stages that read or make data."""

from dataclasses import asdict
from typing import Any

from dvpo.data.formats import read
from dvpo.data.records import dump_examples
from dvpo.data.splits import check_disjoint, split_by_prompt
from reproduce.pipeline import Context


def preferences(ctx: Context) -> dict[str, Any]:
    """Reads preference data and splits it by prompt. Settings: shares {split: share}, hub id or None, file split."""
    source = ctx.settings["hub"] or ctx.inputs["data"]
    data = read(source, split=ctx.settings["split"])
    splits = split_by_prompt(data.examples, ctx.settings["shares"], ctx.seed)
    check_disjoint(splits)
    for name, examples in splits.items():
        dump_examples(examples, ctx.out / f"{name}.jsonl")
    return {
        "data_digest": data.digest,
        "notes": asdict(data.notes),
        "said": data.notes.lines(),
        "examples": {name: len(examples) for name, examples in splits.items()},
    }
