"""The paper's numbers: every cell against the paper's text, the shape of the data, and every note worked out again."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from reproduce.paper import Cell, Fact, cells, facts, notes, value

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT.parent / "shared" / "paper" / "dvpo_paper.txt"
TABLES = range(1, 11)
BENCHMARKS = ("MT-Bench", "Arena-Hard", "AlpacaEval2")
SMALL, LARGE = "Llama3.2-3B-Base", "Llama3-8B-Base"
MISTRAL, LLAMA = "Mistral-7B-Instruct-v0.2", "Llama3-8B-Instruct"
NAMES = {"Remax": "ReMax", "SclarRM": "ScalarRM", "Δ\\Delta": "change"}
SCORES = ("Mean Value", "P1 Value", "P5 Value", "P10 Value", "P90 Value", "P95 Value", "P99 Value")

# What the columns of a table with one method a row stand for, from left to right.
COLUMNS: dict[int, list[tuple[str, str]]] = {
    1: [(model, metric) for model in (SMALL, LARGE) for metric in BENCHMARKS],
    2: [(model, metric) for model in (MISTRAL, LLAMA) for metric in BENCHMARKS],
    4: [(model, "accuracy on UltraFeedback") for model in ("Llama3-8B", "Mistral-7B")],
    5: [(model, "accuracy on HH-RLHF") for model in ("Llama3-8B", "Mistral-7B")],
    7: [(model, metric) for model in (LARGE, SMALL) for metric in ("memory (GB)", "time (s)")],
}
WIDTHS = {3: 4, 8: 4, 9: 2, 10: 4, **{table: len(columns) for table, columns in COLUMNS.items()}}
NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)(\*?)%?")
SYMBOL = re.compile(r"(?:(\d|n)\\times )?([mc])_\{\\mathrm\{(\w+)\}\}|(?<= )-(?= |$)")


@pytest.fixture(scope="module")
def paper() -> str:
    """The paper's text."""
    if not PAPER.is_file():
        pytest.skip(f"the paper's text is not at {PAPER}; the data cannot be compared with it")
    return PAPER.read_text(encoding="utf-8")


def block(paper: str, table: int) -> list[str]:
    """The lines of a table, below its caption."""
    lines = paper.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"Table {table}:"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip() or re.match(r"Table \d+:", line):
            break
        rows.append(line)
    return rows


def numeric_rows(paper: str, table: int) -> Iterator[tuple[str, list[tuple[float, bool]]]]:
    """The label of every row of numbers, and its cells: the number, and whether it is starred."""
    for line in block(paper, table):
        changes = re.findall(r"\((-[\d.]+)%\)", line)
        words = re.sub(r"\(-[\d.]+%\)", "", line).split()
        label, tail = words[: -WIDTHS[table]], [NUMBER.fullmatch(word) for word in words[-WIDTHS[table] :]]
        row = [(float(match[1]), bool(match[2])) for match in tail if match]
        if len(row) == WIDTHS[table]:
            yield " ".join(label), row
        if changes:
            yield "change", [(float(change), False) for change in changes]


def printed(paper: str, table: int) -> list[Cell]:
    """The cells of a table as the paper prints them."""
    if table == 6:
        return symbolic(paper)
    found = []
    model = ""
    for label, row in numeric_rows(paper, table):
        places: list[tuple[str, str, str]]
        if table in COLUMNS:
            places = [(model, NAMES.get(label, label), metric) for model, metric in COLUMNS[table]]
        elif table == 3:
            *named, method = label.split()
            model = "-".join(named) or model
            metrics = ("Chat", "Chat-Hard", "Safety", "Reasoning")
            places = [(model, NAMES.get(method, method), metric) for metric in metrics]
        elif table == 8:
            places = [(model, "GVM", label) for model in ("Llama3-8B", "Llama2-13B", "Llama3-3B", "Mistral-7B")]
        elif table == 9:
            places = [("not named", method, label) for method in ("From Reward", "From Preference")]
        else:
            (kl, _), *row = row
            places = [("not named", f"DVPO, KL {kl:.2f}", metric) for metric in BENCHMARKS]
        found += [Cell(table, *place, *cell) for place, cell in zip(places, row, strict=True)]
    return found


def symbolic(paper: str) -> list[Cell]:
    """The cells of Table 6, read from the LaTeX half of every symbol."""
    header, *rows = block(paper, 6)
    found = []
    for metric, line in zip(("M_train", "M_infer", "C_gene", "C_back"), rows, strict=True):
        _, _, body = line.partition("}} ")
        symbols = [
            (f"{match[1]}*" if match[1] else "") + f"{match[2]}_{match[3]}" if match[2] else "-"
            for match in SYMBOL.finditer(" " + body)
        ]
        found += [Cell(6, "any", method, metric, s) for method, s in zip(header.split(), symbols, strict=True)]
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_the_papers(paper: str, table: int) -> None:
    assert set(cells(table)) == set(printed(paper, table))
    assert len(cells(table)) == len(printed(paper, table))


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("Section 5.1", r"improvements of ([\d.]+) on MT-Bench, ([\d.]+) on Arena-Hard, and ([\d.]+) on"),
        ("Section 5.1", r"a ([\d.]+) increase on MT-Bench, a ([\d.]+)-point increase .*? a ([\d.]+)-point"),
        ("Section 5.2", r"achieves a ([\d.]+) improvement on MT-Bench .*? by ([\d.]+)% on .*? by ([\d.]+)% on"),
        ("Section 5.2", r"outperforming ([\d.]+)% in Arena-Hard and ([\d.]+) in MT-Bench"),
        ("Section 5.2", r"Llama setting, outperforming ([\d.]+) in"),
        ("Section 1", r"memory usage by (\d+)-(\d+)% and training time by (\d+)-(\d+)%"),
        ("Appendix F", r"achieves a ([\d.]+)x speedup"),
        ("Appendix F", r"only approximately (3/4)"),
        ("Figure 4", r"PPO reaches its peak at (\d+) .*? around (\d+) steps.*? peak at (\d+) .*? in (\d+) steps"),
        ("Appendix G", r"from reward model accuracy is ([\d.]+), .*? is ([\d.]+)\. "),
        ("Figure 3", r"“not\" .*?\(([\d.]+)\).*? “is\" \((-[\d.]+)\) and \"an\" \((-[\d.]+)\)"),
    ],
)
def test_every_fact_is_the_papers(paper: str, source: str, pattern: str) -> None:
    stated = [0.75 if text == "3/4" else float(text) for text in re.search(pattern, paper).groups()]  # type: ignore[union-attr]
    values = [fact.value for fact in facts(source)]
    assert any(values[i : i + len(stated)] == stated for i in range(len(values)))


@pytest.mark.parametrize("table", TABLES)
def test_cells_are_unique_and_complete(table: int) -> None:
    keys = [(cell.model, cell.method, cell.metric) for cell in cells(table)]
    assert len(keys) == len(set(keys))
    assert all(all(key) for key in keys)
    assert all(isinstance(cell.value, str) == (table == 6) for cell in cells(table))


def test_the_whole_file_is_read() -> None:
    document = json.loads((ROOT / "reproduce" / "paper_numbers.json").read_text(encoding="utf-8"))
    assert set(document) == {"cells", "facts", "notes"}
    assert sum(len(cells(table)) for table in TABLES) == len(document["cells"]) == 197
    assert sum(len(notes(table)) for table in TABLES) == len(document["notes"])
    assert len(facts()) == len(set(facts())) == len(document["facts"])


def test_value_finds_a_number_or_nothing() -> None:
    assert value(1, SMALL, "DVPO", "MT-Bench") == 5.73
    assert value(1, SMALL, "DPO", "MT-Bench") is None
    assert value(6, "any", "PPO", "M_train") is None
    with pytest.raises(KeyError, match="Tables 1 to 10"):
        cells(11)


def test_facts_of_one_place() -> None:
    assert [fact.value for fact in facts("Figure 4")] == [1250, 800, 600, 350]
    assert facts("Figure 99") == []


def number(table: int, model: str, method: str, metric: str) -> float:
    """A cell that must be there."""
    found = value(table, model, method, metric)
    assert found is not None
    return found


def noted(table: int, *texts: str) -> bool:
    """Whether one note of a table holds all the texts."""
    return any(all(text in note for text in texts) for note in notes(table))


@pytest.mark.parametrize(
    ("table", "models", "baseline"), [(1, (SMALL, LARGE), "SFT"), (2, (MISTRAL, LLAMA), "Instruction")]
)
def test_change_rows_are_points(table: int, models: tuple[str, str], baseline: str) -> None:
    for model in models:
        relative = []
        for metric in BENCHMARKS:
            before = number(table, model, baseline, metric)
            gain = number(table, model, "DVPO", metric) - before
            scale = 10 if metric == "MT-Bench" else 1
            assert number(table, model, "change", metric) == pytest.approx(gain * scale, abs=1e-9)
            relative.append(f"{100 * gain / before:.1f}")
        first, second, third = relative
        assert noted(table, "all six cells agree", f"{first}, {second} and {third}%")


def test_change_cells_of_table_7_are_relative_to_ppo() -> None:
    for model, metric in COLUMNS[7]:
        ppo, dvpo = (number(7, model, method, metric) for method in ("PPO", "DVPO"))
        assert number(7, model, "change", metric) == pytest.approx(100 * (dvpo / ppo - 1), abs=0.05)
    assert noted(7, "relative to PPO", "all four agree")


def test_stated_gains_that_disagree_are_noted() -> None:
    """A gain stated in the text is compared digit by digit with the cells."""
    wrong: list[Fact] = []
    for fact in facts():
        if fact.table and fact.baseline:
            gain = number(fact.table, fact.model, fact.method, fact.metric)
            gain -= number(fact.table, fact.model, fact.baseline, fact.metric)
            if gain != pytest.approx(fact.value, abs=1e-9):
                wrong.append(fact)
                short = "8B" if fact.model == LARGE else "3B"
                assert noted(fact.table, fact.source, fact.metric, short, f" {fact.value:g}", f" {gain:.4g}")
    assert [(fact.model, fact.metric) for fact in wrong] == [
        (LARGE, "MT-Bench"),
        (LARGE, "AlpacaEval2"),
        (SMALL, "Arena-Hard"),
    ]
    assert noted(2, "Section 5.2", "all agree")


def test_stars_of_table_2_are_counted() -> None:
    assert sum(cell.starred for cell in cells(2)) == 9
    assert noted(2, "Nine cells")
    assert not any(cell.starred for table in TABLES if table != 2 for cell in cells(table))


def test_averages_of_table_3() -> None:
    for model in ("Llama3-8B", "Mistral-7B"):
        for method in ("GVM", "ScalarRM"):
            four = [cell.value for cell in cells(3) if (cell.model, cell.method) == (model, method)]
            assert noted(3, f"{sum(map(float, four)) / 4:.5g}")


def test_tables_that_repeat_each_other() -> None:
    for metric in SCORES:
        assert number(8, "Mistral-7B", "GVM", metric) == number(9, "not named", "From Reward", metric)
    for metric in BENCHMARKS:
        assert number(2, LLAMA, "DVPO", metric) == number(10, "not named", "DVPO, KL 0.05", metric)
    for model in ("Llama3-8B", "Mistral-7B"):
        mean = number(8, model, "GVM", "Mean Value")
        assert number(4, model, "GVM", "accuracy on UltraFeedback") == pytest.approx(mean, abs=0.0501)
        assert noted(4, f"{mean}")
    assert noted(8, "Table 9", "Table 4")
    assert noted(9, "Table 8")
    assert noted(10, "Table 2")
    assert noted(2, "Table 10")


def test_savings_stated_in_the_text_against_table_7() -> None:
    memory, time = ({m: -number(7, m, "change", metric) for m in (SMALL, LARGE)} for _, metric in COLUMNS[7][:2])
    assert [30 <= memory[model] <= 40 for model in (SMALL, LARGE)] == [True, False]
    assert all(30 <= saved <= 45 for saved in time.values())
    assert noted(7, "holds for 3B only", f"{memory[LARGE]}%")
    shares = {m: number(7, m, "DVPO", "time (s)") / number(7, m, "PPO", "time (s)") for m in (SMALL, LARGE)}
    assert noted(7, *(f"{share:.2f}" for share in shares.values()), *(f"{1 / share:.2f}" for share in shares.values()))
    ppo_large, dvpo_large, ppo_small, dvpo_small = (fact.value for fact in facts("Figure 4"))
    assert noted(7, f"{dvpo_large / ppo_large:.2f}", f"{dvpo_small / ppo_small:.2f}", "3/4")


def test_cost_forms_of_table_6_against_the_times_of_table_7() -> None:
    for model in (SMALL, LARGE):
        times = {method: number(7, model, method, "time (s)") for method in ("PPO", "DVPO", "GRPO", "ReMax")}
        back = times["PPO"] - times["DVPO"]
        generate = times["DVPO"] - back
        grpo, remax = 5 * generate + back, 2 * generate + back
        assert noted(7, f"{grpo:g} s", f"{remax:g} s", f"{times['GRPO']:g}", f"{times['ReMax']:g}")
        assert abs(grpo / times["GRPO"] - 1) > 0.1
        assert abs(remax / times["ReMax"] - 1) > 0.1


def test_accuracy_grows_with_size_where_the_note_says() -> None:
    sizes = ("Llama3-3B", "Mistral-7B", "Llama3-8B", "Llama2-13B")
    rows = {metric: [number(8, model, "GVM", metric) for model in sizes] for metric in SCORES}
    assert [metric for metric, row in rows.items() if row == sorted(row)] == list(SCORES[:4])
    assert [m for m, row in rows.items() if row[1] < row[0]] == ["P90 Value", "P95 Value"]
    assert [m for m, row in rows.items() if row[3] < row[2]] == ["P95 Value", "P99 Value"]
    assert noted(8, "holds for Mean, P1, P5 and P10", "Llama3-3B at P90 and P95", "Llama3-8B at P95 and P99")


def test_preference_is_ahead_of_reward_in_table_9() -> None:
    reward, preference = (
        {metric: number(9, "not named", method, metric) for metric in SCORES}
        for method in ("From Reward", "From Preference")
    )
    ahead = {metric: preference[metric] - reward[metric] for metric in SCORES}
    assert min(ahead, key=ahead.__getitem__) == "P1 Value"
    assert max(ahead, key=ahead.__getitem__) == "P95 Value"
    assert noted(9, *(f"{ahead[metric]:.2f}" for metric in ("P1 Value", "P95 Value", "Mean Value")), "all seven")
    means = reward["Mean Value"], preference["Mean Value"]
    stated = [fact.value for fact in facts("Appendix G")]
    assert stated == [int(mean) / 100 for mean in means] != [round(mean) / 100 for mean in means]
    assert noted(9, *(f"{number:.2f}" for number in stated), *(f"{round(mean) / 100:.2f}" for mean in means))


def test_kl_ablation_against_the_adopted_coefficient() -> None:
    low, adopted = (number(10, "not named", f"DVPO, KL {kl}", "MT-Bench") for kl in ("0.01", "0.05"))
    gain = adopted - number(2, LLAMA, "Instruction", "MT-Bench")
    assert noted(10, f"{low:.2f}", f"{low - adopted:.2f}", f"{gain:.2f}")
