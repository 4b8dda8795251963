"""`dvpo evaluate ...`: measurements of a value model on data."""

import json
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import require_place, write_json
from reproduce.bundles.adapters import laid_on
from reproduce.commands.common import print_json, require_checkpoint, table_text


def pairwise(
    model: str,
    data: str,
    *,
    split: str | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    per_prompt: int | None,
    most: int | None,
    trajectory_k: int,
    bf16: bool,
    seed: int,
    base: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """How often the model scores the preferred response higher, beside chance and "longer wins"."""
    from dvpo.data.formats import read

    require_place(out)
    require_checkpoint(model)
    dataset = read(data, split=split)
    from dvpo.evaluation.pairwise import evaluate_pairwise

    with laid_on(model, base) as folder:
        found = evaluate_pairwise(
            folder,
            dataset.examples,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            per_prompt=per_prompt,
            most=most,
            trajectory_k=trajectory_k,
            seed=seed,
            bf16=bf16,
        )
    document: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_sha256": dataset.digest,
        "seed": seed,
        "trajectory_k": trajectory_k,
        "bf16": bf16,
        "pairs": len(found.rows),
        "notes": dataset.notes.lines() + found.said,
        "accuracy": found.table,
    }
    if out is not None:
        write_json(out, document)
    if as_json:
        print_json(document)
        return
    for note in document["notes"]:
        print(note)
    rows = [
        (name, f"{cell['accuracy']:.3f}", f"[{cell['ci95'][0]:.3f}, {cell['ci95'][1]:.3f}]", str(cell["n"]))
        for name, cell in found.table.items()
    ]
    print("\n" + table_text(("aggregate", "accuracy", "95 % interval", "n"), rows))


def credit(
    model: str,
    data: str,
    world: Path,
    *,
    split: str | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    per_prompt: int,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """How well the model's values point at the wrong words, beside chance."""
    from dvpo.data.atlas import Atlas
    from dvpo.data.formats import read

    require_place(out)
    require_checkpoint(model)
    try:
        facts = Atlas.from_json(json.loads(world.read_text(encoding="utf-8"))).to_json()
    except (OSError, ValueError) as error:
        raise InputError(f"{world}: no world could be read ({error}); name an atlas stage's world.json") from error
    dataset = read(data, split=split)
    from dvpo.evaluation.credit import evaluate_credit

    found = evaluate_credit(
        model,
        dataset.examples,
        facts,
        per_prompt=per_prompt,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
    )
    document: dict[str, Any] = {"model": model, "data": data, "data_sha256": dataset.digest, "seed": seed, **found}
    if out is not None:
        write_json(out, document)
    if as_json:
        print_json(document)
        return
    rows = [
        ("AUROC of wrong words", found["auroc"], found["auroc_ci95"], 0.5),
        ("lowest step is on a wrong word", found["lowest_hit"], found["lowest_hit_ci95"], found["lowest_chance"]),
    ]
    lines = [(name, f"{x:.3f}", f"[{low:.3f}, {high:.3f}]", f"{chance:.3f}") for name, x, (low, high), chance in rows]
    print(f"{found['n_responses']} answers, {found['n_wrong_tokens']} wrong words, read as {found['reading']}\n")
    print(table_text(("measure", "value", "95 % interval", "chance"), lines))
