"""Tables 1, 2 and 10: policies. In the built-in world by gold score, else by the benchmarks that were run."""

from typing import Any, Literal

from reproduce import paper
from reproduce.recipe import AtlasRecipe, DataRecipe
from reproduce.tables.benchmarks import benchmark_rows
from reproduce.tables.book import LABELS, Book
from reproduce.tables.rows import Direction, Row, filled, not_run, paper_difference, row

BENCHMARKS = {"mt-bench": "MT-Bench", "arena-hard": "Arena-Hard", "alpaca-eval": "AlpacaEval2"}
NAMES = {
    "ppo": "PPO",
    "remax": "ReMax",
    "grpo": "GRPO",
    "dpo": "DPO",
    "dvpo": "DVPO",
    "dvpo-q": "DVPO",
    "dvpo-gae": "DVPO",
}
"""The paper's name of each of our methods; the start is SFT in Table 1 and Instruction in Table 2.
Where several of ours have one name, each goes by its own."""
STARTS = {1: "SFT", 2: "Instruction"}
CLAIMS = {"sft": "improves", "dpo": "dpo", "ppo": "matches", "remax": "matches", "grpo": "matches"}
KINDS: dict[str, Literal["gain", "match"]] = {
    "sft": "gain", "dpo": "gain", "ppo": "match", "remax": "match", "grpo": "match"
}  # fmt: skip
"""What the paper says of DVPO against each: better than its start and DPO, as good or better than others."""
GOLD = "gold score"
NOTE = (
    "Gold score: what the built-in world's judge gives a sampled answer to an unseen prompt, from -1 to 1. "
    "It stands in the benchmarks' place, on a scale of its own, so no paper number is beside it. "
    "In a gain or match row the paper's number is its own difference in MT-Bench, of the first model in the table."
)
KL = {"dvpo-gae-kl-0.01": "0.01", "dvpo-gae": "0.05", "dvpo-gae-kl-0.1": "0.10"}


def table_1(book: Book) -> dict[str, Any]:
    """The Base setting."""
    return _table(book, 1, "Base setting: policies from an SFT model")


def table_2(book: Book) -> dict[str, Any]:
    """The Instruction setting."""
    return _table(book, 2, "Instruction setting: policies from an instruction-tuned model")


def _table(book: Book, table: int, title: str) -> dict[str, Any]:
    rows: list[Row] = []
    if isinstance(book.recipe, AtlasRecipe):
        rows += [gold_row(book, name, LABELS[name]) for name in book.methods()]
        rows += [d.row(book) for d in directions(book, table)]
    measured = []
    if isinstance(book.recipe, DataRecipe) and (book.recipe.sft is not None) == (table == 1):
        ran = [name for name in NAMES if any(book.seeds(f"{prefix}/{name}") for prefix in BENCHMARKS)]
        shared = [NAMES[name] for name in ran]
        methods = {name: NAMES[name] if shared.count(NAMES[name]) == 1 else LABELS[name] for name in ran}
        measured = benchmark_rows(book, table, BENCHMARKS, {"sft": STARTS[table], **methods})
    return {
        "table": table,
        "title": title,
        "note": NOTE if rows else "",
        "rows": [*rows, *filled(table, measured)],
    }


def gold_row(book: Book, name: str, label: str) -> Row:
    """A policy's gold score."""
    return row(book, book.size, label, GOLD, None, book.gold(name))


def directions(book: Book, table: int) -> list[Direction]:
    """DVPO against every other policy, and every policy against its start, where the paper's cells have one sign."""
    methods = book.methods()
    pairs = [(a, "sft") for a in methods if a != "sft"]
    pairs += [(a, b) for a in ("dvpo-q", "dvpo-gae") for b in ("dpo", "ppo", "remax", "grpo")]
    found = []
    for left, right in pairs:
        published = _published(table, left, right)
        if published is not None and left in methods and right in methods:
            claim = f"{CLAIMS[right]} {left}" if left.startswith("dvpo") else f"improves {left}"
            metric = f"{GOLD} (paper: MT-Bench, {paper.cells(table)[0].model})"
            found.append(Direction(claim, f"T{table}", LABELS[left], LABELS[right], metric, published,
                                   book.gains(left, right), kind=KINDS[right]))  # fmt: skip
    return found


def _published(table: int, left: str, right: str) -> float | None:
    names = {"sft": STARTS[table], **NAMES}
    if left not in names or right not in names:
        return None
    cells = paper.cells(table)
    return paper_difference(*([c for c in cells if c.method == names[name]] for name in (left, right)))


def table_10(book: Book) -> dict[str, Any]:
    """The strength of the KL term."""
    rows: list[Row] = []
    if isinstance(book.recipe, AtlasRecipe):
        for name, beta in KL.items():
            if book.seeds(f"gold/{name}"):
                rows.append(gold_row(book, name, f"DVPO (GAE), KL {beta}"))
            else:
                rows.append(not_run(book.size, f"DVPO (GAE), KL {beta}", GOLD, None))
        rows += [d.row(book) for d in kl_directions(book)]
    measured = benchmark_rows(book, 10, BENCHMARKS, {n: f"DVPO, KL {beta}" for n, beta in KL.items()})
    note = "A gain is DVPO against its start; the paper's number is the cell less Table 2's Instruction (Llama)."
    rows = [*rows, *filled(10, measured)]
    return {"table": 10, "title": "Strength of the KL term", "note": note, "rows": rows}


def kl_directions(book: Book) -> list[Direction]:
    """DVPO under every strength against its start."""
    start = [c for c in paper.cells(2) if (c.model, c.method) == ("Llama3-8B-Instruct", "Instruction")]
    found = []
    for name, beta in KL.items():
        if book.seeds(f"gold/{name}") and book.seeds("gold/sft"):
            # Table 10 names no model; its middle row is Table 2's Llama.
            cells = [
                paper.Cell(2, start[0].model, c.method, c.metric, c.value)
                for c in paper.cells(10) if c.method == f"DVPO, KL {beta}"
            ]  # fmt: skip
            found.append(Direction("kl", "T10", f"DVPO (GAE), KL {beta}", "SFT",
                                   f"{GOLD} (paper: MT-Bench)", paper_difference(cells, start),
                                   book.gains(name, "sft")))  # fmt: skip
    return found
