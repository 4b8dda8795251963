"""Runs a recipe: plan, stages, tables, figures, report."""

import shlex
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import require_folder, write_json, write_text
from reproduce.graph import Graph, build
from reproduce.pipeline import Planned, Result, Source, Stage, plan
from reproduce.provenance import code_commit, device, refuse_other_code, versions
from reproduce.recipe import AtlasRecipe, DataRecipe, load, require_pinned
from reproduce.runner import Report, run

TABLES, FIGURES = range(1, 11), range(2, 5)
"""The paper's tables and figures with results."""
COMPUTED = {"T6", "T7"}
"""Tables that a recipe of real data measures nothing for: they need neither its data nor its model."""
SHARED = {"T2": "T1"}
"""What is read off the same stages as another table where the recipe has none of its own for it."""


@dataclass(frozen=True)
class Request:
    """What the user asked for. None means the recipe's own choice.

    everything: every table and figure, also what a plain run of the recipe leaves out.
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
    everything: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request worked out. `wanted`: the tables and figures to show ("T1", "F4"), None for all that the run has."""

    recipe: AtlasRecipe | DataRecipe
    graph: Graph
    wanted: set[str] | None
    stages: list[Stage]
    out: Path


def prepare(request: Request) -> Prepared:
    """Recipe, graph and stages of a request. Raises InputError for what cannot be run.

    Every table and figure of the paper can be asked of every recipe; what it does not measure needs no stages.
    """
    for name, numbers, known in (("Table", request.tables, TABLES), ("Figure", request.figures, FIGURES)):
        if unknown := sorted(set(numbers) - set(known)):
            raise InputError(
                f"the paper has no results in {name} {unknown[0]}; choose --{name.lower()} {known[0]} to {known[-1]}"
            )
    name = request.recipe or _default_recipe()
    seeds = () if request.seeds is None else (f"seeds={request.seeds}",)
    recipe = load(name, request.overrides + seeds)
    wanted = {f"T{n}" for n in request.tables} | {f"F{n}" for n in request.figures}
    computed = isinstance(recipe, DataRecipe) and bool(wanted) and wanted <= COMPUTED and not request.everything
    graph = Graph() if computed else build(recipe, request.data)
    if request.everything:
        stages = graph.order(set(graph.leaves))
    else:
        read = {SHARED.get(w, w) if w not in graph.leaves else w for w in wanted}
        stages = graph.order(read or None)
    shown = None if request.everything else wanted or None
    return Prepared(recipe, graph, shown, stages, request.out or Path("runs") / recipe.name)


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
    from reproduce.report import ReportData, table_text, write_report

    p = prepare(request)
    require_folder(p.out)
    if p.stages:
        require_pinned(p.recipe, request.data)
    if not request.mix_commits:
        refuse_other_code(p.out / "stages")
    started = datetime.now(UTC)
    results = run(p.stages, p.out / "stages", p.recipe.compute.workers, p.recipe.compute.threads, report)
    write_text(p.out / "recipe.json", p.recipe.model_dump_json(indent=1) + "\n")
    write_json(p.out / "manifests.json", {s.id: results[s.id].manifest for s in p.stages})
    made = tables.make(p.recipe, results, p.wanted, p.out)
    _add_commands(request, p, made)
    _write_results(made, p.out / "results")
    page = write_report(
        ReportData(
            title=f"DVPO: recipe {p.recipe.name}",
            run=_run_facts(p, results, started),
            tables=made.tables,
            figures=made.figures,
            sections=made.sections,
            findings=made.findings,
            stages=[_stage_line(s, results[s.id]) for s in p.stages],
            graph=_stage_graph(p, results),
            not_run=made.not_run,
        ),
        p.out,
    )
    return {
        "tables": made.tables,
        "figures": [{"figure": f["figure"], "files": [str(path) for path in f["files"]]} for f in made.figures],
        "report": str(page),
        "text": [
            *(table_text(t) for t in made.tables),
            *_figure_text(made.figures),
            *(f"- {f}" for f in made.findings),
        ],
    }


def _write_results(made: Any, folder: Path) -> None:
    """Every table, figure and claim as JSON, the tables as Markdown too."""
    from reproduce import verdicts
    from reproduce.report import relative
    from reproduce.report_markdown import table_markdown

    for table in made.tables:
        write_json(folder / f"table_{table['table']}.json", table)
        write_text(folder / f"table_{table['table']}.md", table_markdown(table))
    for figure in made.figures:
        if figure.get("rows"):
            files = [relative(path, folder) for path in figure["files"]]
            write_json(folder / f"figure_{figure['figure']}.json", {**figure, "files": files})
    write_json(folder / "claims.json", made.claims)
    write_json(folder / "tolerances.json", verdicts.as_document())
    if made.study is not None:
        write_json(folder / "study.json", made.study)


def _figure_text(figures: list[dict[str, Any]]) -> list[str]:
    """The figures that have rows, for a terminal."""
    from reproduce.report import table_text

    return [table_text({**f, "name": f"Figure {f['figure']}: {f['title']}"}) for f in figures if f.get("rows")]


def _add_commands(request: Request, p: Prepared, made: Any) -> None:
    """Below every table and figure, the command that makes it alone; below the study, the one that makes it all."""
    for part in (*made.tables, *made.figures):
        kind, number = ("table", part["table"]) if "table" in part else ("figure", part["figure"])
        alone = isinstance(number, int)
        part["command"] = (
            _command(request, p, f"--{kind}", str(number)) if alone else _command(request, p, *_all(request))
        )
    made.sections = [replace(s, command=_command(request, p, *_all(request))) for s in made.sections]


def _all(request: Request) -> tuple[str, ...]:
    return ("--all",) if request.everything else ()


def _command(request: Request, p: Prepared, *more: str) -> str:
    """The request as a command line, with other tables and figures."""
    words = ["dvpo", "reproduce", "--recipe", request.recipe or p.recipe.name]
    words += ["--seeds", str(request.seeds)] if request.seeds is not None else []
    words += ["--data", request.data] if request.data is not None else []
    words += [word for override in request.overrides for word in ("--set", override)]
    words += ["--out", str(request.out)] if request.out is not None else []
    return shlex.join([*words, *more])


def _stage_graph(p: Prepared, results: dict[str, Result]) -> dict[str, Any] | None:
    """The picture of the first seed's stages with their keys and times; the other seeds have the same."""
    from reproduce import figures

    stages = [s for s in p.stages if s.seed == 0]
    if not stages:
        return None

    def short(name: str) -> str:
        return name.removeprefix("seed0/")

    nodes = {
        short(s.id): (
            f"{results[s.id].manifest['key'][:8]} · {results[s.id].manifest['seconds']:.0f} s",
            [short(parent.id) for parent in s.parents],
        )
        for s in stages
    }
    files = figures.stage_graph(nodes, p.out / "figures" / "stages")
    caption = "Seed 0: every stage with its key and its seconds, right of all it needs and below the input that ends "
    caption += "the longest chain; the table names every input. "
    caption += "Other seeds have the same stages." if p.recipe.seeds > 1 else ""
    return {"figure": "stages", "title": "Stage graph", "caption": caption.strip(), "files": list(files)}


def _default_recipe() -> str:
    from reproduce.commands.doctor import default_recipe, gpus

    return default_recipe([size for _, size in gpus()])


def _run_facts(p: Prepared, results: dict[str, Result], started: datetime) -> dict[str, Any]:
    manifests = [r.manifest for r in results.values()]
    first = manifests[0] if manifests else {"device": device(), "versions": versions()}
    seconds = sum(m["seconds"] for m in manifests)
    return {
        "recipe": p.recipe.name,
        "command": "dvpo " + shlex.join(sys.argv[1:]),
        "machine": first["device"],
        "commits": sorted({m["git_commit"] for m in manifests} or {code_commit()}),
        "versions": first["versions"],
        "data sha256": _data_digests(p),
        "seeds": list(range(p.recipe.seeds)),
        "first stage started": min((m["started"] for m in manifests), default=None),
        "report started": started.isoformat(timespec="seconds"),
        "cost": f"{len(manifests)} stages, {seconds / 3600:.2f} hours of stages "
        f"({p.recipe.compute.workers} at a time, {p.recipe.compute.threads} threads each)",
    }


def _data_digests(p: Prepared) -> dict[str, str]:
    """What came from outside, by its path's last part; the built-in world makes its data from the seed alone."""
    sources = {
        i.path.name: i.digest for stage in p.stages for i in stage.inputs.values() if isinstance(i, Source)
    }  # fmt: skip
    return sources or {"built-in world": "made from the seeds by the stages called atlas"}


def _stage_line(stage: Stage, result: Result) -> dict[str, Any]:
    m = result.manifest
    needs = list(dict.fromkeys(parent.id for parent in stage.parents))
    line = {"id": stage.id, "kind": stage.kind, "needs": needs, "key": m["key"][:16]}
    return {**line, "seconds": m["seconds"], "state": "done"}
