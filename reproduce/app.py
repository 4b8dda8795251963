"""Runs a recipe: plan, stages, tables, figures, report."""

import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import write_json, write_text
from reproduce.graph import Graph, build
from reproduce.pipeline import Planned, Result, Stage, plan
from reproduce.provenance import refuse_other_code
from reproduce.recipe import AtlasRecipe, DataRecipe, load
from reproduce.runner import Report, run


@dataclass(frozen=True)
class Request:
    """What the user asked for. None means the recipe's own choice.

    mix_commits: in a container, go on with results of another commit's code.
    """

    recipe: str | None
    tables: tuple[int, ...]
    figures: tuple[int, ...]
    seeds: int | None
    data: str | None
    overrides: tuple[str, ...]
    out: Path | None
    mix_commits: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request worked out."""

    recipe: AtlasRecipe | DataRecipe
    graph: Graph
    wanted: set[str] | None
    stages: list[Stage]
    out: Path


def prepare(request: Request) -> Prepared:
    """Recipe, graph and stages of a request. Raises InputError for what cannot be run."""
    name = request.recipe or _default_recipe()
    seeds = () if request.seeds is None else (f"seeds={request.seeds}",)
    recipe = load(name, request.overrides + seeds)
    graph = build(recipe, request.data)
    wanted = {f"T{n}" for n in request.tables} | {f"F{n}" for n in request.figures}
    if missing := sorted(w for w in wanted if w not in graph.leaves):
        known = ", ".join(sorted(n for n in graph.leaves if n[0] in "TF" and n[1:].isdigit()))
        raise InputError(
            f"recipe {recipe.name} does not measure {', '.join(missing)}; it has {known} (T table, F figure)"
        )
    stages = graph.order(wanted or None)
    return Prepared(recipe, graph, wanted or None, stages, request.out or Path("runs") / recipe.name)


def plan_run(request: Request) -> list[Planned]:
    """What the request would run, and why."""
    prepared = prepare(request)
    return plan(prepared.stages, prepared.out / "stages")


def reproduce(request: Request, report: Report) -> dict[str, Any]:
    """Runs what is missing and writes `results/`, `report.html` and the figures into the output folder.

    Returns:
        {"tables", "figures", "report", "text"}; `text` holds the tables for a terminal.
    """
    from reproduce import tables
    from reproduce.report import ReportData, table_markdown, table_text, write_report

    p = prepare(request)
    if not request.mix_commits:
        refuse_other_code(p.out / "stages")
    started = datetime.now(UTC)
    results = run(p.stages, p.out / "stages", p.recipe.compute.workers, p.recipe.compute.threads, report)
    write_text(p.out / "recipe.json", p.recipe.model_dump_json(indent=1) + "\n")
    write_json(p.out / "manifests.json", {s.id: results[s.id].manifest for s in p.stages})
    made = tables.make(p.recipe, results, p.wanted, p.out)
    for table in made.tables:
        write_json(p.out / "results" / f"table_{table['table']}.json", table)
        write_text(p.out / "results" / f"table_{table['table']}.md", table_markdown(table))
    page = write_report(
        ReportData(
            title=f"DVPO: recipe {p.recipe.name}",
            run=_run_facts(p, results, started),
            tables=made.tables,
            figures=made.figures,
            extra=made.extra,
            findings=made.findings,
            stages=[_stage_line(s, results[s.id]) for s in p.stages],
            not_run=made.not_run,
        ),
        p.out,
    )
    return {
        "tables": made.tables,
        "figures": [{"figure": f["figure"], "files": [str(path) for path in f["files"]]} for f in made.figures],
        "report": str(page),
        "text": [*(table_text(t) for t in made.tables), *(f"- {finding}" for finding in made.findings)],
    }


def _default_recipe() -> str:
    from reproduce.commands.doctor import default_recipe, gpus

    return default_recipe([size for _, size in gpus()])


def _run_facts(p: Prepared, results: dict[str, Result], started: datetime) -> dict[str, Any]:
    manifests = [r.manifest for r in results.values()]
    return {
        "recipe": p.recipe.name,
        "command": "dvpo " + shlex.join(sys.argv[1:]),
        "machine": manifests[0]["device"],
        "commits": sorted({m["git_commit"] for m in manifests}),
        "versions": manifests[0]["versions"],
        "seeds": list(range(p.recipe.seeds)),
        "started": started.isoformat(timespec="seconds"),
        "stage seconds": round(sum(m["seconds"] for m in manifests)),
    }


def _stage_line(stage: Stage, result: Result) -> dict[str, Any]:
    m = result.manifest
    return {"id": stage.id, "kind": stage.kind, "key": m["key"][:16], "seconds": m["seconds"], "state": "done"}
