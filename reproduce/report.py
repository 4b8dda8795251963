"""The report of a run: one page that needs nothing else, and the same as Markdown.

A number is shown only if it was given. Where the paper has none there is a dash; where nothing was measured, the
verdict says why. The same data give the same bytes.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpo.files import write_text

DASH = "—"
HEAD = ("model", "method", "metric", "paper", "measured", "95% interval", "n", "seeds", "verdict")
NUMERIC = range(3, 8)  # these columns are aligned right
STAGE_HEAD = ("stage", "kind", "key", "time", "state")

# In the order of the summary. A sign beside the colour, so that the verdict survives print without colour.
SIGNS = {
    "reproduced": "✓",
    "within tolerance": "≈",
    "differs": "✗",
    "not comparable (judge)": "∥",
    "not comparable (scale)": "∥",
    "not run (tier)": "○",
}


@dataclass(frozen=True)
class ReportData:
    """What a report is made of. The tables have the form of `results/table_N.json`"""

    title: str
    run: dict[str, Any]
    """What was run where: recipe, command, machine, commit, versions, digests, seeds, started, seconds."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """{"table", "recipe", "rows"}, and optionally "title", "note", "command"."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """{"figure", "title", "caption", "files", "command"}; of an SVG and a PNG of one name the SVG is shown."""
    extra: list[dict[str, str]] = field(default_factory=list)
    """{"title", "html" or "text"}; the HTML is put in as it is and must be our own."""
    findings: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """{"id", "kind", "key", "seconds", "state"}."""
    not_run: list[str] = field(default_factory=list)


def write_report(data: ReportData, folder: Path) -> Path:
    """Writes `report.html` and `report.md` into the folder and returns the path of the first."""
    page = folder / "report.html"
    write_text(page, _html(data))
    write_text(folder / "report.md", _markdown(data, folder))
    return page


def table_text(table: Mapping[str, Any]) -> str:
    """The table for a terminal: aligned, one row a line, then its note and its command."""
    lines = [HEAD, *(_cells(row) for row in table["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    body = [
        "  ".join(c.rjust(w) if i in NUMERIC else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    after = [table["note"]] if table.get("note") else []
    after += [f"$ {table['command']}"] if table.get("command") else []
    return "\n".join([_table_name(table), *(line.rstrip() for line in body), *after]) + "\n"


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table as GitHub's Markdown, with a heading, its note and its command."""
    parts = [f"### {_md(_table_name(table))}", _md_table(HEAD, map(_cells, table["rows"]), NUMERIC)]
    parts += [_md(table["note"])] if table.get("note") else []
    parts += [_fenced(table["command"])] if table.get("command") else []
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's texts in the order of HEAD."""
    measured, interval, seeds = row["measured"], row.get("ci95"), row.get("seeds")
    places = _places(measured)
    return (
        str(row["model"]),
        str(row["method"]),
        str(row["metric"]),
        # The paper's number as the paper has it, not rounded.
        DASH if row["paper"] is None else str(row["paper"]),
        row["verdict"] if measured is None else _number(measured, places),
        DASH if interval is None else f"[{_number(interval[0], places)}, {_number(interval[1], places)}]",
        DASH if row.get("n") is None else f"{row['n']:,}",
        DASH if seeds is None else ", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds),
        row["verdict"],
    )


def _places(value: Any) -> int:
    """The decimals that show four digits of the value; its interval is shown with as many."""
    if isinstance(value, str) or not value or not math.isfinite(value):
        return 3
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 8)


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


def _table_name(table: Mapping[str, Any]) -> str:
    name = f"Table {table['table']}" + (f": {table['title']}" if table.get("title") else "")
    return f"{name} (recipe {table['recipe']})"


def _counts(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """How often each verdict was given, the known ones first."""
    counts = Counter(row["verdict"] for table in tables for row in table["rows"])
    return [(verdict, counts[verdict]) for verdict in [*SIGNS, *sorted(set(counts) - set(SIGNS))] if counts[verdict]]


def _flat(value: Any) -> str:
    """A setting of the run as one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value))
    return DASH if value is None else str(value)


def _run_lines(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run where: for each name one line, or as many as there are names below it."""
    lines = []
    for name, value in run.items():
        below = value.items() if isinstance(value, Mapping) else [("", _seconds(value) if name == "seconds" else value)]
        lines.append(("time" if name == "seconds" else str(name), [(str(key), _flat(inner)) for key, inner in below]))
    return lines


def _stage_cells(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (str(s["id"]), str(s["kind"]), str(s["key"])[:16], _seconds(s.get("seconds")), str(s["state"])) for s in stages
    ]


def _shown(files: Sequence[str | Path]) -> list[Path]:
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
        run=_run_lines(data.run),
        counts=_counts(data.tables),
        signs=SIGNS,
        head=HEAD,
        tables=[
            {"note": "", "command": "", **table, "name": _table_name(table), "groups": _groups(table)}
            for table in data.tables
        ],
        figures=[
            {"command": "", **figure, "pictures": _pictures(number, figure)}
            for number, figure in enumerate(data.figures)
        ],
        stage_head=STAGE_HEAD,
        stages=_stage_cells(data.stages),
    )


def _groups(table: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The rows' texts below the model they belong to, in the order the models first appear."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in table["rows"]:
        groups.setdefault(str(row["model"]), []).append(_cells(row))
    return groups


def _pictures(number: int, figure: Mapping[str, Any]) -> list[Any]:
    """The figure's pictures as markup that needs no other file."""
    from markupsafe import Markup, escape

    pictures = []
    for part, path in enumerate(_shown(figure["files"])):
        if path.suffix == ".svg":
            pictures.append(Markup(_inline_svg(path.read_text(encoding="utf-8"), f"f{number}-{part}-")))
        else:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">')
            pictures.append(image.format(escape(figure["title"]), data))
    return pictures


def _inline_svg(text: str, prefix: str) -> str:
    """An SVG file's element, fit to stand in a page beside others: its ids get the prefix.

    Namespaces, which a page does not need, and metadata go: they are the only addresses of other sites in it.
    """
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", '<svg role="img"', 1)


# --- Markdown


def _markdown(data: ReportData, folder: Path) -> str:
    run = [(name, "; ".join(f"{key} {value}".strip() for key, value in lines)) for name, lines in _run_lines(data.run)]
    counts = [(f"{SIGNS.get(verdict, '')} {verdict}".strip(), str(count)) for verdict, count in _counts(data.tables)]
    parts = [f"# {_md(data.title)}", "## What was run where", _md_table(("", ""), run)]
    parts += ["## Findings", _list(data.findings), _md_table(("verdict", "rows"), counts, range(1, 2))]
    parts += ["## Tables", *(table_markdown(table).rstrip() for table in data.tables)] if data.tables else []
    parts += ["## Figures", *(_md_figure(figure, folder) for figure in data.figures)] if data.figures else []
    for section in data.extra:
        body = _fenced(section["text"]) if "text" in section else "This part is in `report.html`."
        parts += [f"## {_md(section['title'])}", body]
    parts += ["## Stages", _md_table(STAGE_HEAD, _stage_cells(data.stages), range(3, 4))]
    parts += ["## What was not run", _list(data.not_run)]
    return "\n\n".join(parts) + "\n"


def _md_figure(figure: Mapping[str, Any], folder: Path) -> str:
    title = _md(f"Figure {figure['figure']}: {figure['title']}")
    images = [f"![{title}](<{Path(os.path.relpath(path, folder)).as_posix()}>)" for path in _shown(figure["files"])]
    command = [_fenced(figure["command"])] if figure.get("command") else []
    return "\n\n".join([f"### {title}", *images, _md(figure["caption"]), *command])


def _md_table(head: Sequence[str], rows: Iterable[tuple[str, ...]], right: range = range(0)) -> str:
    rule = ["--:" if i in right else "---" for i in range(len(head))]
    lines = [head, rule, *([_md(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md(text: str) -> str:
    """Plain text as Markdown: nothing in it is markup, and it stays on one line."""
    text = re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _fenced(text: str) -> str:
    """The text as a block of code; the fence is longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {_md(item)}" for item in items) or "Nothing."
