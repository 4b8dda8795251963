"""The report of a run: one page that needs nothing else, and the same as Markdown and as JSON.

A number is shown only if it was given. Where the paper has none there is a dash; where nothing was measured, the
verdict says why. The same data give the same bytes.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dvpo.files import write_json, write_text

DASH = "—"
HEAD = ("model", "method", "metric", "paper", "measured", "95% interval", "n", "seeds", "verdict")
NUMERIC = range(3, 8)  # these columns are aligned right
STAGE_HEAD = ("stage", "kind", "needs", "key", "time", "state")

# In the order of the summary. A sign beside the colour, so that the verdict survives print without colour.
SIGNS = {
    "reproduced": "✓",
    "within tolerance": "≈",
    "differs": "✗",
    "not comparable (judge)": "∥",
    "not comparable (scale)": "∥",
    "not run (tier)": "○",
    "baseline": "⋯",
    "not in the paper": "+",
}


@dataclass(frozen=True)
class Sheet:
    """A table of texts with columns of its own; `numeric` are those that are aligned right."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    numeric: range = range(0)


@dataclass(frozen=True)
class Section:
    """A page of the report: paragraphs, sheets, then figures in the form of `ReportData.figures`."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""


@dataclass(frozen=True)
class ReportData:
    """What a report is made of. The tables have the form of `results/table_N.json`"""

    title: str
    run: dict[str, Any]
    """What was run where: recipe, command, machine, commit, versions, digests, seeds, started, seconds."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """{"table", "recipe", "rows"}, and optionally "title", "note", "command", "paper_notes", "bounds"."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """{"figure", "title", "caption", "files"}, and optionally "command", "rows" (as a table's), "bounds"; of an SVG
    and a PNG of one name the SVG is shown."""
    sections: list[Section] = field(default_factory=list)
    extra: list[dict[str, str]] = field(default_factory=list)
    """{"title", "html" or "text"}; the HTML is put in as it is and must be our own."""
    findings: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """{"id", "kind", "key", "seconds", "state"}, and optionally "needs", the ids of its inputs."""
    graph: dict[str, Any] | None = None
    """The picture of the stages, in the form of `figures`."""
    not_run: list[str] = field(default_factory=list)


def write_report(data: ReportData, folder: Path) -> Path:
    """Writes `report.html`, `report.md` and `report.json` into the folder and returns the path of the first."""
    from reproduce.report_markdown import markdown

    page = folder / "report.html"
    write_text(page, _html(data))
    write_text(folder / "report.md", markdown(data, folder))
    write_json(folder / "report.json", as_document(data, folder))
    return page


def as_document(data: ReportData, folder: Path) -> dict[str, Any]:
    """The report as JSON; files are named from the folder."""
    document = asdict(data)
    pictures = [*document["figures"], *(f for s in document["sections"] for f in s["figures"])]
    for figure in [*pictures, *([document["graph"]] if data.graph else [])]:
        figure["files"] = [relative(path, folder) for path in figure["files"]]
    for section in document["sections"]:
        for sheet in section["sheets"]:
            del sheet["numeric"]
    return {**document, "verdicts": dict(counts(data))}


def table_text(table: Mapping[str, Any]) -> str:
    """The table for a terminal: aligned, one row a line, then its note and its command."""
    lines = [HEAD, *(cells(row) for row in table["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    body = [
        "  ".join(c.rjust(w) if i in NUMERIC else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    after = [table["note"]] if table.get("note") else []
    after += [f"$ {table['command']}"] if table.get("command") else []
    return "\n".join([table_name(table), *(line.rstrip() for line in body), *after]) + "\n"


def relative(path: str | Path, folder: Path) -> str:
    """A file's name as seen from the folder."""
    return Path(os.path.relpath(path, folder)).as_posix()


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's texts in the order of HEAD."""
    measured, interval, seeds = row["measured"], row.get("ci95"), row.get("seeds")
    places = _places(measured)
    return (
        str(row["model"]),
        str(row["method"]),
        str(row["metric"]),
        # The paper's number as the paper has it, not rounded.
        DASH if row["paper"] is None else str(row["paper"]),
        _unmeasured(row) if measured is None else _number(measured, places),
        DASH if interval is None else f"[{_number(interval[0], places)}, {_number(interval[1], places)}]",
        DASH if row.get("n") is None else f"{row['n']:,}",
        DASH if seeds is None else ", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds),
        row["verdict"],
    )


def _unmeasured(row: Mapping[str, Any]) -> str:
    """What stands in the place of a number that was not measured: a prediction that says so, or the verdict."""
    if "predicted" not in row:
        return str(row["verdict"])
    return f"{'fitted' if row['fitted'] else 'predicted'} {_number(row['predicted'], _places(row['predicted']))}"


def _places(value: Any) -> int:
    """The decimals that show four digits of the value, four decimals at most; its interval is shown with as many."""
    if isinstance(value, str) or not value or not math.isfinite(value):
        return 3
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 4)


def _number(value: Any, places: int) -> str:
    if isinstance(value, str | int):
        return f"{value:,}" if isinstance(value, int) else value
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3e}" if 0 < abs(value) < 1e-4 else f"{value:,.{places}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def table_name(table: Mapping[str, Any]) -> str:
    if "name" in table:
        return str(table["name"])
    name = f"Table {table['table']}" + (f": {table['title']}" if table.get("title") else "")
    return f"{name} (recipe {table['recipe']})"


def counts(data: ReportData) -> list[tuple[str, int]]:
    """How often each verdict was given, the known ones first."""
    found = Counter(row["verdict"] for _, rows in _by_name(data) for row in rows)
    return [(verdict, found[verdict]) for verdict in [*SIGNS, *sorted(set(found) - set(SIGNS))] if found[verdict]]


def summary(data: ReportData) -> Sheet:
    """The verdicts of every table and figure, a column for each verdict that was given."""
    verdicts = [verdict for verdict, _ in counts(data)]
    rows = []
    for name, part in _by_name(data):
        found = Counter(row["verdict"] for row in part)
        rows.append((name, *(str(found[verdict] or "") for verdict in verdicts)))
    head = ("rows by verdict", *(f"{SIGNS.get(verdict, '?')} {verdict}" for verdict in verdicts))
    total = ("all", *(str(count) for _, count in counts(data)))
    return Sheet("Verdicts", head, [*rows, total] if rows else [], "", range(1, len(head)))


def _by_name(data: ReportData) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of every table and figure that has any."""
    tables = [(f"Table {t['table']}", t["rows"]) for t in data.tables]
    return [*tables, *((f"Figure {f['figure']}", f["rows"]) for f in data.figures if f.get("rows"))]


def _flat(value: Any) -> str:
    """A setting of the run as one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value))
    return DASH if value is None else str(value)


def run_lines(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run where: for each name one line, or as many as there are names below it."""
    lines = []
    for name, value in run.items():
        below = value.items() if isinstance(value, Mapping) else [("", _seconds(value) if name == "seconds" else value)]
        lines.append(("time" if name == "seconds" else str(name), [(str(key), _flat(inner)) for key, inner in below]))
    return lines


def stage_cells(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            str(s["id"]),
            str(s["kind"]),
            ", ".join(s.get("needs", ())),
            str(s["key"])[:16],
            _seconds(s.get("seconds")),
            str(s["state"]),
        )
        for s in stages
    ]


def shown(files: Sequence[str | Path]) -> list[Path]:
    """The files of a figure to show: of an SVG and a PNG of one name only the SVG, which is sharp at any size."""
    paths = [Path(file) for file in files]
    return [p for p in paths if p.suffix == ".svg" or p.with_suffix(".svg") not in paths]


# --- HTML


def _html(data: ReportData) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["verdict_class"] = lambda verdict: re.sub(r"\W+", "-", verdict.split(" (")[0])
    return environment.get_template("report.html.j2").render(
        data=data,
        run=run_lines(data.run),
        counts=counts(data),
        summary=summary(data),
        signs=SIGNS,
        head=HEAD,
        tables=[{**_OPTIONAL, **table, "name": table_name(table), "groups": _groups(table)} for table in data.tables],
        figures=[_figure(f"f{number}", figure) for number, figure in enumerate(data.figures)],
        sections=[
            (section, [_figure(f"s{place}-{number}", figure) for number, figure in enumerate(section.figures)])
            for place, section in enumerate(data.sections)
        ],
        graph=_figure("g", data.graph) if data.graph else None,
        stage_head=STAGE_HEAD,
        stages=stage_cells(data.stages),
    )


_OPTIONAL: dict[str, Any] = {"note": "", "command": "", "paper_notes": (), "bounds": ()}


def _figure(prefix: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with its pictures as markup and its rows as a table's."""
    rows = {"table": "", "rows": figure.get("rows", ())}
    return {**_OPTIONAL, **figure, "pictures": _pictures(prefix, figure), "groups": _groups(rows)}


def _groups(table: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The rows' texts below the model they belong to, in the order the models first appear."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in table["rows"]:
        groups.setdefault(str(row["model"]), []).append(cells(row))
    return groups


def _pictures(prefix: str, figure: Mapping[str, Any]) -> list[Any]:
    """The figure's pictures as markup that needs no other file."""
    from markupsafe import Markup, escape

    pictures = []
    for part, path in enumerate(shown(figure["files"])):
        if path.suffix == ".svg":
            pictures.append(Markup(inline_svg(path.read_text(encoding="utf-8"), f"{prefix}-{part}-")))
        else:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">')
            pictures.append(image.format(escape(figure["title"]), data))
    return pictures


def inline_svg(text: str, prefix: str) -> str:
    """An SVG file's element, fit to stand in a page beside others: its ids get the prefix.

    Namespaces, which a page does not need, and metadata go: they are the only addresses of other sites in it.
    """
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", '<svg role="img"', 1)
