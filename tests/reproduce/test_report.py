"""The report: the numbers given and no others, nothing from outside, text that stays text, the same bytes again."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reproduce import figures, token_picture
from reproduce.report import ReportData, table_markdown, table_text, write_report

ROW: dict[str, Any] = {
    "model": "Llama3-8B",
    "method": "GVM",
    "metric": "accuracy",
    "paper": 64.2,
    "measured": 0.71234567,
    "ci95": [0.68, 0.74],
    "n": 2000,
    "seeds": [0, 1, 2],
    "verdict": "reproduced",
}
TABLE: dict[str, Any] = {
    "table": 4,
    "recipe": "tiny",
    "title": "Pairwise accuracy",
    "note": "Chance is 0.5.",
    "command": "dvpo reproduce --table 4",
    "rows": [
        ROW,
        {**ROW, "model": "Mistral-7B", "paper": None, "measured": 0.5, "ci95": None, "verdict": "differs"},
        {**ROW, "method": "a|b", "measured": None, "ci95": None, "n": None, "seeds": None, "verdict": "not run (tier)"},
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    files = [str(p) for p in figures.bars([{"label": "a", "value": 0.7, "low": 0.6, "high": 0.8}], tmp_path / "f", "x")]
    scored = token_picture.Scored("DVPO", "p", ["<script>", "x\n"], [1.0, -1.0], [0.0, 0.0])
    figure = {"figure": 4, "title": "Curves <b>", "caption": "What it shows.", "command": "dvpo reproduce --figure 4"}
    return ReportData(
        title="Run <script>alert(1)</script>",
        run={
            "recipe": "tiny",
            "machine": {"cpu": "A & B", "cores": 4},
            "seeds": [0, 1],
            "commit": None,
            "seconds": 3725.4,
        },
        tables=[TABLE],
        figures=[
            {**figure, "files": files},
            {**figure, "figure": 5, "files": files[1:]},
            {**figure, "files": files[:1]},
        ],
        extra=[
            {"title": "Tokens", "html": token_picture.html([scored])},
            {"title": "Log", "text": "a <script>\n```\nb"},
        ],
        findings=["DVPO beats SFT <here> on 3 of 4 *tables*."],
        stages=[{"id": "sft", "kind": "sft", "key": "0123456789abcdef0123", "seconds": 61.2, "state": "done"}],
        not_run=["Table 9: needs 8 GPUs."],
    )


class Page(HTMLParser):
    """A page's elements with their attributes, and its text; fails where an element is not closed."""

    EMPTY = ("br", "wbr", "meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_page_shows_the_numbers_it_was_given(data: ReportData, tmp_path: Path) -> None:
    page = write_report(data, tmp_path)
    assert page == tmp_path / "report.html"
    text = squeezed(Page(page).text)
    for row in (
        "GVM accuracy 64.2 0.7123 [0.6800, 0.7400] 2,000 0, 1, 2 ✓ reproduced",
        "GVM accuracy — 0.5000 — 2,000 0, 1, 2 ✗ differs",
        "a|b accuracy 64.2 not run (tier) — — — ○ not run (tier)",
    ):
        assert row in text
    for part in (
        "time 1 h 02 min",
        "cpu A & B",
        "commit —",
        "dvpo reproduce --table 4",
        "Chance is 0.5.",
        "Table 9: needs 8 GPUs.",
    ):
        assert part in text
    assert "✓ reproduced 1" in text
    assert "✗ differs 1" in text
    assert "within tolerance" not in text, "no row has this verdict"
    order = [
        "What was run where",
        "DVPO beats SFT",
        "Pairwise accuracy (recipe",
        "What it shows.",
        "1 min 01 s",
        "Table 9: needs",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_rows_stand_under_their_model_even_when_given_apart(data: ReportData, tmp_path: Path) -> None:
    text = squeezed(Page(write_report(data, tmp_path)).text)
    assert text.index("a|b accuracy") < text.index("Mistral-7B")


def test_text_stays_text(data: ReportData, tmp_path: Path) -> None:
    page = Page(write_report(data, tmp_path))
    assert "script" not in {tag for tag, _ in page.elements}
    for text in ("Run <script>alert(1)</script>", "SFT <here>", "a <script>\n```\nb", "Curves <b>"):
        assert text in page.text


def test_the_page_needs_nothing_from_outside(data: ReportData, tmp_path: Path) -> None:
    path = write_report(data, tmp_path)
    assert not re.search(r"https?://|<script|<link|@import", path.read_text(encoding="utf-8"))
    page = Page(path)
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert len(page.values("src")) == 1, "the second figure has a PNG only"
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = page.values("href") + page.values("xlink:href")
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    used = re.findall(r"url\(#(.*?)\)", path.read_text(encoding="utf-8"))
    assert used
    assert set(used) <= set(ids)
    assert sum(tag == "svg" for tag, _ in page.elements) == 2


def test_the_same_data_give_the_same_bytes(data: ReportData, tmp_path: Path) -> None:
    names = ("report.html", "report.md")
    write_report(data, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in names]
    write_report(data, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first


def test_the_markdown_says_the_same(data: ReportData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_report(data, folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "| Llama3-8B | GVM | accuracy | 64.2 | 0.7123 | [0.6800, 0.7400] | 2,000 | 0, 1, 2 | reproduced |"
        in text.replace("\\", "")
    )
    assert "# Run \\<script\\>" in text
    assert "\\*tables\\*" in text
    assert "](<../f.svg>)" in text
    assert "````\na <script>\n```\nb\n````" in text
    assert "| time | 1 h 02 min |" in text
    assert "| ✗ differs | 1 |" in text
    assert "| sft | sft | 0123456789abcdef | 1 min 01 s | done |" in text


def test_an_empty_report_is_a_report(tmp_path: Path) -> None:
    text = squeezed(Page(write_report(ReportData("Nothing yet", {}), tmp_path)).text)
    assert "Findings Nothing." in text
    assert "What was not run Nothing." in text


def test_the_optional_parts_of_a_table_may_be_absent(data: ReportData, tmp_path: Path) -> None:
    bare = {key: TABLE[key] for key in ("table", "recipe", "rows")}
    unknown = {**bare, "rows": [{**ROW, "verdict": "held <back>"}]}
    text = Page(write_report(replace(data, tables=[bare, unknown]), tmp_path)).text
    assert "Table 4 (recipe tiny)" in text
    assert "? held <back>" in squeezed(text)
    assert "$" not in table_text(bare)


def test_the_terminal_table_is_aligned() -> None:
    lines = table_text(TABLE).splitlines()
    assert lines[0] == "Table 4: Pairwise accuracy (recipe tiny)"
    assert lines[1].startswith("model       method  metric    paper        measured")
    assert lines[-2:] == ["Chance is 0.5.", "$ dvpo reproduce --table 4"]
    rows = lines[1:-2]
    assert len({line.index(word) for line, word in zip(rows[2:], ("reproduced", "differs"), strict=False)}) == 1
    end = rows[0].index("measured") + len("measured")
    assert rows[2][:end].endswith(" 0.7123")
    assert rows[3][:end].endswith("—          0.5000")
    assert rows[4][:end].endswith("not run (tier)")


def test_the_markdown_table_keeps_its_columns() -> None:
    lines = [line for line in table_markdown(TABLE).splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert "a\\|b" in lines[-1]
    assert table_markdown(TABLE).endswith("```\ndvpo reproduce --table 4\n```\n")


@pytest.mark.parametrize(
    ("measured", "interval", "expected"),
    [
        (41.4, [40.0, 43.25], "41.40 [40.00, 43.25]"),
        (-0.3, [-0.5, 0.0], "-0.3000 [-0.5000, 0.0000]"),
        (0.0, [0.0, 0.1], "0.000 [0.000, 0.100]"),
        (12345.6, None, "12,346 —"),
        (8030261248, None, "8,030,261,248 —"),
        (0.0000012345, [0.0, 0.1], "1.234e-06 [0.00000000, 0.10000000]"),
        (float("nan"), None, "not finite —"),
        ("2 models", None, "2 models —"),
    ],
)
def test_numbers_have_four_digits_and_intervals_as_many_places(measured: Any, interval: Any, expected: str) -> None:
    text = table_text({"table": 1, "recipe": "tiny", "rows": [{**ROW, "measured": measured, "ci95": interval}]})
    assert f" {expected} " in re.sub(" +", " ", text)
