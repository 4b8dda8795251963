"""Tables 6 and 7: what a method costs, as symbols, counted, measured, and by the cost model."""

from typing import Any

from reproduce import paper, verdicts
from reproduce.tables.book import Book
from reproduce.tables.rows import Row, not_run, paper_rows

METHODS = {"dvpo-gae": "DVPO", "ppo": "PPO", "remax": "ReMax", "grpo": "GRPO"}
UNITS = {
    "M_train": "models trained", "M_infer": "models that only infer", "C_gene": "responses generated per prompt",
    "C_back": "texts learned from per prompt and epoch",
}  # fmt: skip
BESIDE = "Llama3.2-3B-Base"
MEASURED = (
    "Measured: medians over rounds in one run, each method in a process of its own; the range of the rounds stands in "
    "the interval's place, and that of a change spans the ratios of all rounds. Memory is the growth of the process's "
    "peak over its imports; at this size it is mostly the allocator's. Beside it stand the paper's numbers for "
    f"{BESIDE}."
)
PREDICTED = (
    "Predicted: by the cost model; its three constants are fitted on the paper's PPO and DVPO rows (these say fitted). "
    "A prediction is no measurement, and no verdict is given on it."
)
SYMBOLS = (
    "The paper's forms beside those of what is implemented here. Ours differ where our GRPO learns from all n "
    "responses; the paper's form counts one."
)


def table_6(book: Book) -> dict[str, Any]:
    """The cost model as symbols, then an update of every method that was measured, in the same units."""
    from reproduce.cost.calls import symbolic_table

    ours = {(r["method"], r["metric"]): r["ours"] for r in symbolic_table()}
    rows = []
    for made in paper_rows(6):
        form = ours[made["method"], made["metric"]]
        verdict = verdicts.cell("T6", made["metric"], made["paper"], form, None)
        rows.append({**made, "measured": form, "verdict": verdict})
    return {"table": 6, "title": "Cost model", "note": SYMBOLS, "rows": [*rows, *counted_rows(book)]}


def counted_rows(book: Book) -> list[Row]:
    """Table 6's quantities of one update: counted in the run, or worked out from the settings where it was not."""
    from dvpo.config import PolicySettings
    from reproduce.cost.calls import table_6

    found = book.results.get("seed0/cost")
    rows: list[Row] = []
    for name, settings in found.manifest["settings"]["methods"].items() if found else ():
        assert found is not None
        method = PolicySettings.model_validate(settings)
        counts = found.manifest["metrics"]["methods"][name].get("calls")
        group = getattr(method.algorithm, "group_size", 1)
        for metric, value in table_6(method, counts).items():
            form = next(c.value for c in paper.cells(6) if (c.method, c.metric) == (METHODS[name], metric))
            expected = float(_number(str(form), group))
            how = "counted in an update" if counts else "worked out from the settings"
            rows.append({
                **not_run(book.size, METHODS[name], f"{metric}: {UNITS[metric]}, {how}", expected),
                "measured": float(value), "seeds": 1, "verdict": verdicts.cell("T6", metric, expected, value, None),
            })  # fmt: skip
    return rows


def _number(form: str, group: int) -> int:
    """How many of its unit a form is: "-" none, "c_gene" one, "2*c_gene" two, "n*c_gene" as many as a group has."""
    times, star, _ = form.partition("*")
    if form == "-":
        return 0
    return 1 if not star else group if times == "n" else int(times)


def table_7(book: Book) -> dict[str, Any]:
    """Seconds per update and peak memory."""
    rows: list[Row] = []
    found = book.results.get("seed0/cost")
    costs = found.manifest["metrics"]["methods"] if found else {}
    rounds = found.manifest["settings"]["rounds"] if found else None
    for name, cost in costs.items():
        for metric, value, spread in (
            ("time (s)", cost["seconds"], cost["seconds_range"]), ("memory (GB)", cost["memory_mb"] / 1024, None),
        ):  # fmt: skip
            rows.append({
                "model": book.size, "method": METHODS[name], "metric": metric,
                "paper": paper.value(7, BESIDE, METHODS[name], metric),
                "measured": round(value, 4), "ci95": spread and [round(x, 4) for x in spread], "n": rounds, "seeds": 1,
                "verdict": verdicts.OTHER_SCALE,
            })  # fmt: skip
    rows += savings(book)
    note = f"{MEASURED} {PREDICTED}" if rows else PREDICTED
    return {"table": 7, "title": "Cost of an update", "note": note, "rows": [*rows, *predicted_rows()]}


def predicted_rows() -> list[Row]:
    """The paper's cells with the cost model's number for each; `fitted` where its constants were fitted on it."""
    from reproduce.cost.table7 import table_7_predictions

    known = {tuple(r["cell"].values()): r for r in table_7_predictions()}
    rows = []
    for made in paper_rows(7):
        found = known.get((made["model"], made["method"], made["metric"]))
        rows.append(made | ({"predicted": found["predicted"], "fitted": found["fitted"]} if found else {}))
    return rows


def savings(book: Book) -> list[Row]:
    """DVPO's change against PPO in percent. The interval spans the ratios of all rounds, so it is wider than needed.

    Memory is one number, judged with the margin on both sides of it.
    """
    found = book.results.get("seed0/cost")
    costs = found.manifest["metrics"]["methods"] if found else {}
    if found is None or not {"dvpo-gae", "ppo"} <= set(costs):
        return []
    ours, ppo = costs["dvpo-gae"], costs["ppo"]
    (low, high), (ppo_low, ppo_high) = ours["seconds_range"], ppo["seconds_range"]
    time = _change(book, "time (s)", ours["seconds"] / ppo["seconds"] - 1)
    saved = 1 - ours["memory_mb"] / ppo["memory_mb"]
    memory = _change(book, "memory (GB)", -saved)
    margin = verdicts.margin("T7")
    memory["verdict"] = verdicts.gain("T7", [saved - margin, saved + margin], 1)
    spread = [low / ppo_high - 1, high / ppo_low - 1]
    rounds = found.manifest["settings"]["rounds"]
    time["ci95"] = [round(100 * end, 4) for end in spread]
    if rounds > 1:  # one has no spread
        time["verdict"] = verdicts.gain("T7", [-spread[1], -spread[0]], 1)
    return [made | {"n": rounds} for made in (time, memory)]


def _change(book: Book, metric: str, ratio: float) -> Row:
    published = paper.value(7, BESIDE, "change", metric)
    made = not_run(book.size, "DVPO against PPO", f"gain: change of {metric}, percent", published)
    return made | {"measured": round(100 * ratio, 4), "seeds": 1, "verdict": verdicts.OTHER_SCALE}
