"""`dvpo evaluate ...`: measurements of a value model on data."""

from pathlib import Path
from typing import Any

from dvpo.files import write_json
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
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """How often the model scores the preferred response higher, beside chance and "longer wins"."""
    from dvpo.data.formats import read

    require_checkpoint(model)
    dataset = read(data, split=split)
    from dvpo.evaluation.pairwise import evaluate_pairwise

    found = evaluate_pairwise(
        model,
        dataset.examples,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        per_prompt=per_prompt,
        most=most,
        seed=seed,
    )
    document: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_sha256": dataset.digest,
        "seed": seed,
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
