"""The report as GitHub's Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce import report

if TYPE_CHECKING:
    from reproduce.report import ReportData, Section, Sheet


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table with a heading, its note, what the paper says against itself, its bounds and its command."""
    rows = _table(report.HEAD, map(report.cells, table["rows"]), report.NUMERIC)
    parts = [f"### {_md(report.table_name(table))}", rows]
    parts += [_md(table["note"])] if table.get("note") else []
    parts += _notes(table)
    parts += [_fenced(table["command"])] if table.get("command") else []
    return "\n\n".join(parts) + "\n"


def markdown(data: "ReportData", folder: Path) -> str:
    """The whole report; pictures are named from the folder."""
    run = [
        (name, "; ".join(f"{key} {value}".strip() for key, value in lines))
        for name, lines in report.run_lines(data.run)
    ]
    parts = [f"# {_md(data.title)}", "## What was run where", _table(("", ""), run)]
    parts += ["## Findings", _list(data.findings), *_sheet(report.summary(data))]
    for section in data.sections:
        parts += _section(section, folder)
    parts += ["## Tables", *(table_markdown(table).rstrip() for table in data.tables)] if data.tables else []
    parts += ["## Figures", *(_figure(figure, folder) for figure in data.figures)] if data.figures else []
    for extra in data.extra:
        body = _fenced(extra["text"]) if "text" in extra else "This part is in `report.html`."
        parts += [f"## {_md(extra['title'])}", body]
    parts += ["## Stages", _table(report.STAGE_HEAD, report.stage_cells(data.stages), range(4, 5))]
    parts += ["## What was not run", _list(data.not_run)]
    return "\n\n".join(parts) + "\n"


def _section(section: "Section", folder: Path) -> list[str]:
    parts = [f"## {_md(section.title)}", *map(_md, section.paragraphs)]
    for sheet in section.sheets:
        parts += _sheet(sheet)
    parts += [_figure(figure, folder) for figure in section.figures]
    return parts + ([_fenced(section.command)] if section.command else [])


def _sheet(sheet: "Sheet") -> list[str]:
    if not sheet.rows:
        return []
    note = [_md(sheet.note)] if sheet.note else []
    return [f"### {_md(sheet.title)}", _table(sheet.head, sheet.rows, sheet.numeric), *note]


def _figure(figure: Mapping[str, Any], folder: Path) -> str:
    title = _md(f"Figure {figure['figure']}: {figure['title']}")
    images = [f"![{title}](<{report.relative(path, folder)}>)" for path in report.shown(figure["files"])]
    parts = [f"### {title}", *images, _md(figure["caption"])]
    if figure.get("rows"):
        parts.append(_table(report.HEAD, map(report.cells, figure["rows"]), report.NUMERIC))
    parts += _notes(figure)
    return "\n\n".join([*parts, *([_fenced(figure["command"])] if figure.get("command") else [])])


def _notes(part: Mapping[str, Any]) -> list[str]:
    found = []
    for name, title in (("paper_notes", "The paper on its own numbers:"), ("bounds", "What counts as reproduced:")):
        if part.get(name):
            found += [title, _list(part[name])]
    return found


def _table(head: Sequence[str], rows: Iterable[tuple[str, ...]], right: range = range(0)) -> str:
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
