"""`dvpo evaluate rewardbench | alpaca-eval`: the two benchmarks that the packages of their names define."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dvpo.files import require_place, write_json
from reproduce.bundles.adapters import laid_on
from reproduce.commands import evaluate_judged as judged
from reproduce.commands.common import print_json, require_checkpoint, table_text


def rewardbench(
    model: str, data: str, *, split: str | None, base: Path | None, out: Path | None, as_json: bool
) -> None:
    """RewardBench, or the parts of it that the data has, of a value model or scalar reward model."""
    require_place(out)
    require_checkpoint(model)
    from dvpo.evaluation.rewardbench import evaluate_rewardbench, read_pairs

    read = read_pairs(data, split)
    with laid_on(model, base) as folder:
        found = evaluate_rewardbench(folder, read.pairs)
    document: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_sha256": read.digest,
        "pairs": len(read.pairs),
        "notes": read.notes,
        **found,
    }
    if out is not None:
        write_json(out, document)
    if as_json:
        print_json(document)
        return
    for note in read.notes:
        print(note)
    if count := found["too_long"]["count"]:
        print(
            f"{count} of {len(read.pairs)} pairs are over the model's {found['too_long']['limit']} tokens: not scored"
        )
    print(f"{found['benchmark']}\n\n{_sections_text(found)}")


def _sections_text(found: dict[str, Any]) -> str:
    entries = [(entry["label"], f"{entry['pairs']} of {entry['of']}", entry) for entry in found["sections"].values()]
    if found["average"] is not None:
        entries.append(("average of the sections", "", {"accuracy": found["average"]}))
    rows = [
        (label, pairs, name, f"{cell['accuracy']:.3f}", f"[{cell['ci95'][0]:.3f}, {cell['ci95'][1]:.3f}]")
        for label, pairs, entry in entries
        for name, cell in entry["accuracy"].items()
    ]
    return table_text(("section", "pairs", "aggregate", "accuracy", "95 % interval"), rows, left=(0, 1, 2))


def alpaca_eval(r: judged.Request, gamed: str | None) -> None:
    """AlpacaEval 2 of one policy against a baseline; `gamed` is what the length-controlled win rate needs."""
    from dvpo.evaluation import alpaca_eval as protocol
    from dvpo.evaluation import benchmark_data

    whole = benchmark_data.load("alpaca_eval", r.benchmark_data)
    work = protocol.alpaca_eval(
        replace(whole, questions=benchmark_data.evenly(whole.questions, r.most)),
        judged._answers(r, r.model, protocol.MAX_NEW_TOKENS),
        judged._answers(r, r.baseline, protocol.MAX_NEW_TOKENS),
        judged._judge(r),
        prompt=judged._prompt(r, protocol.PROMPT),
        max_tokens=r.judge_max_tokens or protocol.JUDGE_TOKENS,
        temperature=r.temperature,
        places=protocol.places_in(whole),
        gamed=None if gamed is None else protocol.gamed_file(gamed),
    )
    judged._run(r, work, _alpaca_text)


def _alpaca_text(document: dict[str, Any]) -> str:
    controlled = document["length_controlled"]
    lines = [
        (name, judged._number(cell["win_rate"], 1), judged._interval(cell.get("ci95"), 1))
        for name, cell in (("raw", document), ("length-controlled", controlled))
    ]
    lines.append(("discrete", judged._number(document["discrete_win_rate"], 1), ""))
    table = table_text(("", "win rate %", "95 % interval"), lines)
    return f"{table}\n\nno length-controlled win rate: {controlled['why']}" if "why" in controlled else table
