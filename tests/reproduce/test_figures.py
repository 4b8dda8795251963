"""The figures and the token picture: what they write, that they write it again byte for byte, what they refuse."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dvpo.errors import InputError
from reproduce import figures, token_picture
from reproduce.token_picture import Scored

UPDATES: list[float] = [0, 10, 20]
CURVE: figures.Curve = {"updates": UPDATES, "mean": [0.1, None, 0.3], "low": [0.0, 0.1, 0.2], "high": [0.2, 0.3, 0.4]}
ROWS: list[figures.Bar] = [
    {"label": "GVM", "value": 0.71, "low": 0.68, "high": 0.74},
    {"label": "longer wins", "value": 0.55, "low": None, "high": None},
    {"label": "$not math$", "value": None, "low": None, "high": None},
]
STAGES = {
    "data": ("0123 · 1 s", []), "sft": ("4567 · 2 s", ["data"]), "gvm": ("89ab · 3 s", ["data", "sft"]),
    "rm": ("cdef · 3 s", ["sft"]), "lemma": ("0000 · 0 s", []),
}  # fmt: skip
RESPONSES = [
    Scored("DVPO", "Say <hi>\nplease", ["<script>", " a", "b\n", "\t", "你"], [1.0, 0.0, -2.0, 0.5, 0.5], [0.0] * 5),
    Scored("SFT", "Other", ["x", "<eos>"], [2.0, -1.0], [0.25, 0.0]),
]

Drawing = Callable[[Path], tuple[Path, Path]]
DRAWINGS: dict[str, Drawing] = {
    "learning curves": lambda path: figures.learning_curves({"DVPO": CURVE, "PPO": CURVE}, path, "gold score", "Gold"),
    "bars": lambda path: figures.bars(ROWS, path, "accuracy", 0.5, "chance"),
    "bars without a reference": lambda path: figures.bars(ROWS, path, "accuracy"),
    "small curves": lambda path: figures.small_curves(dict.fromkeys("abcd", CURVE), path),
    "panels": lambda path: figures.panels({name: {"value": CURVE, "gold": CURVE} for name in "abcd"}, path),
    "shares": lambda path: figures.shares([("A : B", (0.5, 0.3, 0.2)), ("A : C", (1.0, 0.0, 0.0))], path),
    "stage graph": lambda path: figures.stage_graph(STAGES, path),
    "token picture": lambda path: token_picture.draw(RESPONSES, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_writes_svg_and_png_and_the_same_bytes_again(name: str, tmp_path: Path) -> None:
    first, second = DRAWINGS[name](tmp_path / "one"), DRAWINGS[name](tmp_path / "two")
    assert [path.name for path in first] == ["one.svg", "one.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert ET.parse(first[0]).getroot().tag.endswith("svg")
    assert first[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("given", "stem"), [("llama3.2-3b", "llama3.2-3b"), ("a.svg", "a"), ("a.png", "a")])
def test_only_a_picture_suffix_is_dropped_from_the_name(given: str, stem: str, tmp_path: Path) -> None:
    written = figures.bars(ROWS, tmp_path / given, "accuracy")
    assert written == (tmp_path / f"{stem}.svg", tmp_path / f"{stem}.png")


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    svg, _ = figures.bars(ROWS, tmp_path / "bars", "accuracy", 0.5, "chance")
    texts = re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))  # matplotlib notes each text in a comment
    assert {"GVM", "$not math$", "0.710", "no value", "chance"} <= set(texts)


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"a": {"updates": [1, 2], "mean": [1.0]}},
        {"a": {"mean": [1.0]}},
        {"a": {"updates": [1], "mean": [1.0], "low": [1.0]}},
        {"a": {"updates": [1], "mean": [1.0], "low": [1.0], "high": []}},
    ],
)
def test_broken_curves_are_refused(curves: dict[str, figures.Curve], tmp_path: Path) -> None:
    for drawing in (
        lambda: figures.learning_curves(curves, tmp_path / "x", "y", "t"),
        lambda: figures.small_curves(curves, tmp_path / "x"),
        lambda: figures.panels({"a": curves}, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match="curve"):
            drawing()
    assert not list(tmp_path.iterdir())


def test_broken_bars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        figures.bars([], tmp_path / "x", "y")
    with pytest.raises(ValueError, match=r"interval of a goes from 2.* to 1"):
        figures.bars([{"label": "a", "value": 1.5, "low": 2.0, "high": 1.0}], tmp_path / "x", "y")


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.1), (1.2, -0.2, 0.0)])
def test_shares_that_are_none_are_refused(shares: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares of A do not sum to 1"):
        figures.shares([("A", shares)], tmp_path / "x")
    with pytest.raises(ValueError, match="no rows"):
        figures.shares([], tmp_path / "x")


def test_a_stage_hangs_from_the_end_of_its_longest_chain_and_shares_its_first_childs_row() -> None:
    column, parent = figures._tree(STAGES)
    assert column == {"data": 0, "sft": 1, "gvm": 2, "rm": 2, "lemma": 0}
    assert parent == {"data": None, "sft": "data", "gvm": "sft", "rm": "sft", "lemma": None}
    assert figures._tree_rows(parent) == {"data": 0, "sft": 0, "gvm": 0, "rm": 1, "lemma": 2}
    with pytest.raises(ValueError, match="stage b needs a"):
        figures.stage_graph({"b": ("", ["a"]), "a": ("", [])}, Path("x"))
    with pytest.raises(ValueError, match="no stages"):
        figures.stage_graph({}, Path("x"))


def test_settings_of_matplotlib_are_left_as_they_were(tmp_path: Path) -> None:
    import matplotlib

    # Without "backend": to read that one chooses a backend.
    before = {name: matplotlib.rcParams[name] for name in set(matplotlib.rcParams) - {"backend"}}
    figures.bars(ROWS, tmp_path / "x", "accuracy")
    assert {name: matplotlib.rcParams[name] for name in before} == before
    assert "matplotlib.pyplot" not in sys.modules


def test_importing_is_cheap() -> None:
    code = (
        "import sys, reproduce.figures, reproduce.token_picture, reproduce.report;"
        "assert not {'matplotlib', 'jinja2', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_zero_is_white_and_the_sign_is_the_colour() -> None:
    assert token_picture.colour(0.0, 3.0) == "#ffffff"
    assert token_picture.colour(3.0, 3.0) == "#0072b2"
    assert token_picture.colour(-3.0, 3.0) == "#d55e00"
    half = token_picture.colour(1.5, 3.0)
    assert "#0072b2" < half < "#ffffff"


def test_all_responses_share_one_scale() -> None:
    assert token_picture.limit(RESPONSES) == 2.0
    boxes = re.findall(r'style="background:(#\w+);color:(#\w+)" title="“(.*?)”', token_picture.html(RESPONSES))
    colours = {token: back for back, _, token in boxes}
    assert colours["b⏎"] == "#d55e00"
    assert colours["x"] == "#0072b2"
    assert colours[" a"] == "#ffffff"
    assert colours["&lt;script&gt;"] == token_picture.colour(1.0, 2.0), (
        "half the scale, though the largest of its response"
    )
    inks = {token: ink for _, ink, token in boxes}
    assert (inks["x"], inks[" a"]) == ("#ffffff", "#000000")


@pytest.mark.parametrize("q", [[], [0.0, 0.0]])
def test_a_scale_without_values_is_still_a_scale(q: list[float]) -> None:
    response = Scored("a", "b", ["x"] * len(q), q, q)
    assert token_picture.limit([response]) == 1.0
    assert "-1.00" in token_picture.html([response])


class Outline(HTMLParser):
    """The texts and titles of a fragment, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title" and value]
        if tag not in ("br", "wbr", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_escapes_and_shows_the_numbers() -> None:
    outline = Outline(token_picture.html(RESPONSES))
    assert not outline.open
    assert outline.tags == {"div", "style", "span", "h4", "br", "wbr"}
    for text in ("<script>", "<eos>", "Say <hi>\nplease", "b⏎", "\\t", "你", "DVPO", "SFT"):
        assert text in outline.text
    assert outline.titles[-2] == "“x”\nq = 2.0000\nv = 0.2500\nq − v = 1.7500"


def test_characters_without_a_shape_are_written_as_escapes(tmp_path: Path) -> None:
    response = Scored("\x00", "\ud800", ["\u202e", "\x1b"], [1.0, 1.0], [0.0, 0.0])
    token_picture.write([response], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for escape in ("\\x00", "\\ud800", "\\u202e", "\\x1b"):
        assert escape in page


def test_the_drawing_has_every_token_and_number(tmp_path: Path) -> None:
    svg, _ = token_picture.draw(RESPONSES, tmp_path / "tokens")
    texts = re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))
    expected = {
        "&lt;script&gt;",
        "b⏎",
        "\\t",
        "\\u4f60",
        "&lt;eos&gt;",
        "1.00",
        "0.00",
        "-2.00",
        "+2.00",
        "q = 0",
        "DVPO",
        "please",
    }
    assert expected <= set(texts)


def test_long_responses_wrap_and_the_drawing_grows(tmp_path: Path) -> None:
    def size(count: int) -> tuple[float, float]:
        response = Scored("a", "b", [" word"] * count + ["=" * 300], [0.5] * (count + 1), [0.0] * (count + 1))
        svg, _ = token_picture.draw([response], tmp_path / str(count))
        root = ET.parse(svg).getroot()
        return float(root.attrib["width"].removesuffix("pt")), float(root.attrib["height"].removesuffix("pt"))

    (width, low), (same, high) = size(5), size(100)
    assert width == same == token_picture.WIDTH
    assert high > low + 5 * token_picture.LINE
    right = max(p.x + p.width for p in token_picture._place([Scored("a", "b" * 999, ["=" * 300], [0.0], [0.0])]))
    assert right <= token_picture.WIDTH - token_picture.MARGIN


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_write_makes_the_one_file_asked_for(suffix: str, tmp_path: Path) -> None:
    token_picture.write(RESPONSES, tmp_path / f"tokens{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"tokens{suffix}"]


def test_two_thousand_tokens_are_a_page_and_no_drawing(tmp_path: Path) -> None:
    long = [Scored("a", "b", [" word"] * 2000, [0.5] * 2000, [0.0] * 2000)]
    token_picture.write(long, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count('class="token"') == 2000
    assert "http" not in page
    assert "<script" not in page
    for name in ("a.png", "a.svg"):
        with pytest.raises(InputError, match=r"2000 tokens are too much .* \.html"):
            token_picture.write(long, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_few_tokens_of_great_length_are_no_drawing_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html"):
        token_picture.write([Scored("a", "b", ["=" * 200_000], [0.5], [0.0])], tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.PNG.txt"])
def test_another_suffix_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"'{Path(name).suffix}'"):
        token_picture.write(RESPONSES, tmp_path / name)


@pytest.mark.parametrize(
    ("q", "v"), [([1.0], [0.0, 0.0]), ([1.0, float("nan")], [0.0, 0.0]), ([1.0, 2.0], [0.0, float("inf")])]
)
def test_values_that_do_not_fit_the_tokens_are_refused(q: list[float], v: list[float]) -> None:
    with pytest.raises(ValueError, match="a: "):
        Scored("a", "b", ["x", "y"], q, v)
