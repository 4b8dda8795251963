"""The report: the numbers given and no others, nothing from outside, text that stays text, the same bytes again."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reproduce import figures, token_picture
from reproduce.report import ReportData, Section, Sheet, table_text, write_report
from reproduce.report_markdown import table_markdown

CHROMIUM = Path("/usr/bin/chromium")
OWN = ("file://", "data:")

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
        stages=[
            {
                "id": "sft",
                "kind": "sft",
                "key": "0123456789abcdef0123",
                "seconds": 61.2,
                "state": "done",
                "needs": ["base", "data"],
            }
        ],
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
    assert "rows by verdict ✓ reproduced ✗ differs ○ not run (tier) Table 4 1 1 1 all 1 1 1" in text
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
    assert "| rows by verdict | ✓ reproduced | ✗ differs | ○ not run (tier) |" in text
    assert "| sft | sft | base, data | 0123456789abcdef | 1 min 01 s | done |" in text


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
        (0.0000012345, [0.0, 0.1], "1.234e-06 [0.0000, 0.1000]"),
        (float("nan"), None, "not finite —"),
        ("2 models", None, "2 models —"),
    ],
)
def test_numbers_have_four_digits_and_intervals_as_many_places(measured: Any, interval: Any, expected: str) -> None:
    text = table_text({"table": 1, "recipe": "tiny", "rows": [{**ROW, "measured": measured, "ci95": interval}]})
    assert f" {expected} " in re.sub(" +", " ", text)


class TestParts:
    """What a report may have beside tables and figures."""

    def test_a_section_is_in_every_form(self, data: ReportData, tmp_path: Path) -> None:
        sheet = Sheet("Pairs <1>", ("left", "p"), [("a|b", "0.01"), ("c", "")], "Holm's <method>.", range(1, 2))
        figure = {**data.figures[0], "figure": "study", "command": ""}
        section = Section("The study", ["Plain <words>."], [sheet], [figure], "dvpo reproduce --all")
        path = write_report(replace(data, sections=[section]), tmp_path / "run")
        page = Page(path)
        text = squeezed(page.text)
        for part in ("Plain <words>.", "Pairs <1>", "a|b 0.01", "Holm's <method>.", "dvpo reproduce --all"):
            assert part in text
        assert text.index("What it shows.") < text.index("Plain <words>.") < text.index("1 min 01 s")
        assert sum(tag == "svg" for tag, _ in page.elements) == 3
        ids = page.values("id")
        assert len(ids) == len(set(ids)), "the same picture twice has ids of its own"
        markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
        assert "## The study" in markdown
        assert "| a\\|b | 0.01 |" in markdown
        document = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
        assert document["sections"][0]["sheets"][0]["rows"] == [["a|b", "0.01"], ["c", ""]]
        assert document["verdicts"] == {"reproduced": 1, "differs": 1, "not run (tier)": 1}
        assert document["figures"][0]["files"] == ["../f.svg", "../f.png"]

    def test_the_rows_and_bounds_of_a_figure_are_shown_and_counted(self, data: ReportData, tmp_path: Path) -> None:
        figure = {**data.figures[0], "files": [], "rows": [{**ROW, "method": "win rate"}], "bounds": ["Over 50."]}
        text = squeezed(Page(write_report(replace(data, figures=[figure]), tmp_path)).text)
        assert "win rate accuracy 64.2 0.7123" in text
        assert "What counts as reproduced Over 50." in text
        assert "Figure 4 1 all 2 1 1" in text
        assert "Over 50." in (tmp_path / "report.md").read_text(encoding="utf-8")

    def test_what_the_paper_says_against_itself_stands_below_its_table(self, data: ReportData, tmp_path: Path) -> None:
        table = {**TABLE, "paper_notes": ["It says 1.74 where <cells> give 1.54."], "bounds": ["Up to 2."]}
        text = squeezed(Page(write_report(replace(data, tables=[table]), tmp_path)).text)
        assert "The paper on its own numbers It says 1.74 where <cells> give 1.54." in text
        assert "The paper on its own numbers:\n\n- It says" in (tmp_path / "report.md").read_text(encoding="utf-8")

    def test_a_prediction_is_named_so(self) -> None:
        row = {**ROW, "measured": None, "ci95": None, "n": None, "seeds": None, "verdict": "not run (tier)"}
        rows = [{**row, "predicted": 30.63, "fitted": False}, {**row, "predicted": 47.08, "fitted": True}]
        text = table_text({"table": 7, "recipe": "tiny", "rows": rows})
        assert "predicted 30.63" in text
        assert "fitted 47.08" in text

    def test_the_stage_graph_is_drawn_and_counts_as_no_figure(self, data: ReportData, tmp_path: Path) -> None:
        graph = {**data.figures[0], "figure": "stages", "title": "Stage graph", "caption": "Seed 0."}
        page = Page(write_report(replace(data, graph=graph), tmp_path))
        assert "Seed 0." in page.text
        assert "Figure stages" not in page.text


@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"the report is tried in {CHROMIUM}, which is absent")
def test_in_a_browser_it_fits_a_phone_and_a_sheet(data: ReportData, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    wide = "a command with many words " * 12
    path = write_report(replace(data, tables=[{**TABLE, "command": wide}] * 3), tmp_path)
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--headless", "--no-sandbox"])
        for width, height in ((1200, 900), (390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("console", lambda message: said.append(message.text))
            page.on("request", lambda request: said.append(request.url) if not request.url.startswith(OWN) else None)
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
            heading = page.locator("thead").first
            assert (heading.bounding_box() or {"height": 0})["height"] > 1 or width < 700, "cards have no header line"
            assert page.locator("svg").first.is_visible()
            page.close()
        page = browser.new_page()
        page.goto(path.as_uri())
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert page.locator("pre").first.evaluate("e => e.scrollWidth <= e.clientWidth"), "a command wraps on paper"
        assert page.pdf()[:4] == b"%PDF"
        browser.close()
    assert said == []
