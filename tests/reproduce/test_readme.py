"""README and its companions: links lead somewhere, commands exist, figures are those of the committed results."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer

from dvpo.evaluation.intervals import between_seeds
from reproduce.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "artifacts").glob("*.md")), ROOT / "reproduce" / "decisions.md"]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_are_there(document: Path) -> None:
    text = document.read_text()
    linked = [document.parent / name.split("#")[0] for name in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in name]
    paths = re.findall(r"`((?:artifacts|dvpo|examples|reproduce|server|tests)/[\w./-]+)`", text)
    assert [str(path) for path in (*linked, *(ROOT / name for name in paths)) if not path.exists()] == []


def commands() -> list[str]:
    blocks = re.findall(r"(?ms)^```\n(.*?)^```", README)
    found = [part for block in blocks for line in block.splitlines() for part in line.split(" · ")]
    return [command for command in found if command.startswith("dvpo ")]


@pytest.mark.parametrize("command", commands())
def test_commands_and_their_options_exist(command: str) -> None:
    words = re.split(r"\s{2,}|\s#", command)[0].split()[1:]
    leaves: list[Any] = [typer.main.get_command(app)]
    for names in words:
        if not hasattr(leaves[0], "get_command"):
            break
        leaves = [leaf.get_command(click.Context(leaf), name) for leaf in leaves for name in names.split("|")]
        assert None not in leaves, names
    for leaf in leaves:
        known = {option for parameter in leaf.params for option in parameter.opts}
        assert {word.strip("[]") for word in words if word.strip("[").startswith("--")} <= known


def row(start: str) -> str:
    """The one table row of README that begins so."""
    found = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    assert len(found) == 1, (start, found)
    return found[0]


def given(name: str) -> Any:
    return json.loads((ROOT / "artifacts" / name).read_text())


def spread(number: float, low: float, high: float, digits: int) -> str:
    return f"{number:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def measured(file: str, method: str, metric: str, digits: int, by_seed: Sequence[float], own: Any = ()) -> str:
    """A row of a result's table as README writes it: its interval widened to the seeds', which it was made without.

    own: the interval of every seed, where all are tested on the same prompts.
    """
    rows = [r for r in given(file)["rows"] if r["method"] == method and metric in r["metric"] and r["measured"]]
    assert np.mean(by_seed) == pytest.approx(rows[0]["measured"], abs=1e-3)
    ends = np.array([rows[0]["ci95"], *([np.mean(own, axis=0)] if own else [])])
    mean, (low, high) = between_seeds(by_seed, (float(ends[:, 0].min()), float(ends[:, 1].max())))
    return spread(mean, low, high, digits)


def metrics(run: str, stage: str, seeds: int) -> list[dict[str, Any]]:
    """A stage's metrics, by seed."""
    manifests = given(f"{run}/manifests.json")
    return [manifests[f"seed{seed}/{stage}"]["metrics"] for seed in range(seeds)]


def gold_scores(method: str) -> list[float]:
    return [found["gold"] for found in metrics("tiny", f"gold/{STAGES[method]}", 5)]


def accuracy(run: str, stage: str, how: str, seeds: int) -> tuple[list[float], list[list[float]]]:
    """In percent: every seed's accuracy, and its interval."""
    cells = [found["accuracy"][how] for found in metrics(run, stage, seeds)]
    return [100 * cell["accuracy"] for cell in cells], [[100 * end for end in cell["ci95"]] for cell in cells]


STAGES = {
    "SFT": "sft",
    "DPO": "dpo",
    "PPO": "ppo",
    "ReMax": "remax",
    "GRPO": "grpo",
    "DVPO (A = Q)": "dvpo-q",
    "DVPO (A = Q, whitened)": "dvpo-q-whitened",
    "DVPO (GAE)": "dvpo-gae",
    "DVPO (official)": "dvpo-official",
}


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("document", ["README.md", "artifacts/measured.md"])
def test_policies_are_those_of_the_run(document: str, method: str) -> None:
    lines = (ROOT / document).read_text().splitlines()
    shown = [text for text in lines if re.match(rf"\| {re.escape(method)}(,[\w' ]+)? \| 0\.\d+ \[", text)]
    gold = gold_scores(method)
    assert f"| {measured('tiny/results/table_1.json', method, 'gold score', 3, gold)} |" in shown[0]
    assert f"| {', '.join(f'{score:.2f}'.lstrip('0') for score in gold)} |" in shown[0]
    if method in ("PPO", "ReMax", "GRPO", "DVPO (A = Q)", "DVPO (GAE)"):  # the gains that a table has
        table = "tiny/results/table_2.json" if method == "ReMax" else "tiny/results/table_1.json"
        gains = [score - start for score, start in zip(gold, gold_scores("SFT"), strict=True)]
        assert f"| {measured(table, f'{method} − SFT', 'gain', 3, gains)} |" in shown[0]


@pytest.mark.parametrize(
    ("start", "stage", "table", "judge", "how", "credit"),
    [
        ("GVM, mean |", "gvm", 4, "GVM", "mean", "GVM, Q - V"),
        ("PPO's critic at the end", "critic", 4, "A/C", "mean", "PPO critic, Q - V"),
        ("ScalarRM, its score spread", "rm", 3, "ScalarRM", "last", "ScalarRM, spread evenly"),
    ],
)
def test_value_models_are_those_of_the_run(
    start: str, stage: str, table: int, judge: str, how: str, credit: str
) -> None:
    right, _ = accuracy("tiny", f"accuracy/{stage}", how, 5)
    assert measured(f"tiny/results/table_{table}.json", judge, "accuracy", 1, right) in row(start)
    found = [seed["auroc"] for seed in metrics("tiny", f"credit/{stage}", 5)]
    assert measured("tiny/results/table_credit.json", credit, "AUROC", 3, found) in row(start)
    lowest = [r for r in given("tiny/results/table_credit.json")["rows"] if r["method"] == credit][1]["measured"]
    assert row(start).endswith(f"| {100 * lowest:.0f} |")


@pytest.mark.parametrize("other", ["PPO", "GRPO", "ReMax"])
def test_differences_between_policies_are_those_of_the_run(other: str) -> None:
    gains = [ours - its for ours, its in zip(gold_scores("DVPO (GAE)"), gold_scores(other), strict=True)]
    assert measured("tiny/results/table_1.json", f"DVPO (GAE) − {other}", "match", 3, gains) in README


def test_the_lowest_step_beside_the_critics_is_that_of_the_run() -> None:
    found = ([100 * seed["lowest_hit"] for seed in metrics("tiny", f"credit/{s}", 5)] for s in ("gvm", "critic"))
    differences = [ours - its for ours, its in zip(*found, strict=True)]
    mean, (low, high) = between_seeds(differences, (np.mean(differences), np.mean(differences)))
    assert f"{mean:.1f} points less [{low:.1f}, {high:.1f}]" in README


def test_real_text_is_that_of_the_run() -> None:
    for start, method, stage, how in (
        ("GVM from", "GVM", "gvm", "mean"),
        ("ScalarRM of", "ScalarRM", "rm", "last"),
        ("the longer", "longer wins", "gvm", "longer wins"),
    ):
        for table, name in (("table_5", "hh-rlhf"), ("table_3" if method == "ScalarRM" else "table_4", "in-domain")):
            seeds = accuracy("small-gpu", f"{name}/{stage}", how, 3)
            assert measured(f"small-gpu/results/{table}.json", method, "accuracy", 1, *seeds) in row(start)


def workload(file: str, clients: str, kind: str) -> dict[str, Any]:
    found = [w for w in given(file)["workloads"] if w["workload"].endswith(clients) and kind in w["workload"]]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("start", "file", "clients", "kind"),
    [
        ("server beside vLLM, 8 responses", "bench/server-vllm-float32.json", " 4 clients", "groups"),
        ("server beside vLLM, distinct", "bench/server-vllm-float32.json", " 16 clients", "distinct"),
        ("the same, 4 clients", "bench/server-vllm-float32-few-clients.json", " 4 clients", "distinct"),
        ("the same, 1 client", "bench/server-vllm-float32-few-clients.json", " 1 client", "distinct"),
        ("the same beside a bare", "bench/server-bare-float32.json", " 16 clients", "distinct"),
        ("on an Intel CPU", "amx/server-vllm-bfloat16.json", " 1 client", "distinct"),
        ("there, distinct", "amx/server-vllm-bfloat16.json", " 16 clients", "distinct"),
        ("there, groups, 1", "amx/server-vllm-bfloat16.json", " 1 client", "groups"),
        ("there, groups, 4", "amx/server-vllm-bfloat16.json", " 4 clients", "groups"),
        ("there in float32, distinct, 1 ", "amx/server-vllm-float32-one-client.json", " 1 client", "distinct"),
        ("there in float32, distinct, 16", "amx/server-vllm-float32.json", " 16 clients", "distinct"),
        ("there in float32, groups", "amx/server-vllm-float32.json", " 4 clients", "groups"),
        ("there in float32 beside a bare", "amx/server-bare-float32.json", " 16 clients", "distinct"),
    ],
)
def test_the_servers_speed_is_that_of_the_benchmarks(start: str, file: str, clients: str, kind: str) -> None:
    found = workload(file, clients, kind)
    ours, other = (round(found[f"{who}_tokens_per_second"]["median"]) for who in ("ours", "other"))
    assert f"| {ours:,} | {other:,} | {spread(**_named(found['ratio']), digits=2)} |" in row(start)


def test_trainings_speed_is_that_of_the_benchmarks() -> None:
    policy, grpo, gvm = (given(f"bench/{name}.json") for name in ("policy", "policy-trl", "gvm-trl"))
    ratio = policy["ratios"]["dvpo / ppo"]
    ours, ppo = (policy["methods"][method] for method in ("dvpo", "ppo"))
    seconds = f"| {ours['seconds']['median']:.1f} | {ppo['seconds']['median']:.1f} "
    assert f"{seconds}| {spread(**_named(ratio['seconds']), digits=2)} |" in row("DVPO beside PPO: seconds")
    memory = f"| {ours['memory_mb'] / 1000:.1f} | {ppo['memory_mb'] / 1000:.1f} "
    assert f"{memory}| {ratio['memory']:.2f} |" in row("DVPO beside PPO: peak memory")
    seconds = "".join(f"| {grpo['methods'][who]['seconds']['median']:.1f} " for who in ("grpo", "trl"))
    between = spread(**_named(grpo["ratios"]["grpo / trl"]["seconds"]), digits=2)
    assert f"{seconds}| {between} |" in row("GRPO beside TRL's")
    speed = "".join(f"| {gvm['trainers'][who]['tokens_per_second']['median']:.0f} " for who in ("ours", "trl"))
    between = spread(**_named(gvm["tokens_per_second_ratio"]), digits=2)
    assert f"{speed}| {between} |" in row("GVM training beside TRL's")


def _named(of: dict[str, float]) -> dict[str, float]:
    return {"number": of["median"], "low": of["low"], "high": of["high"]}


def test_the_same_seeds_on_the_other_cpu() -> None:
    table = (ROOT / "artifacts" / "measured.md").read_text().partition("| on the Intel machine | gold score |")[2]
    rows = given("tiny-intel/results/table_1.json")["rows"] + given("tiny-intel/results/table_2.json")["rows"]
    found = {(r["method"], r["metric"].partition(" (")[0]): r for r in rows if r["measured"] is not None}
    for method, stage in STAGES.items():
        score = found[method, "gold score"]
        by_seed = [m["gold"] for m in metrics("tiny-intel", f"gold/{stage}", 5)]
        said = ", ".join(f"{x:.2f}".removeprefix("0") for x in by_seed)
        assert f"| {method} | {spread(score['measured'], *score['ci95'], 3)} | {said} |" in table
    for name in ("DVPO (GAE)", "PPO", "GRPO", "ReMax", "DPO", "DVPO (A = Q)", "DVPO (official)"):
        assert spread(found[name, "gold score"]["measured"], *found[name, "gold score"]["ci95"], 3) in README
    for other, places in (("PPO", (README, table)), ("ReMax", (README, table)), ("GRPO", (table,)), ("DPO", (table,))):
        (less,) = [r for (method, _), r in found.items() if method == f"DVPO (GAE) \u2212 {other}"]
        assert all(spread(less["measured"], *less["ci95"], 3) in place for place in places), other
