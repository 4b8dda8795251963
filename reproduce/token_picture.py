"""Figure 3 of the paper: every token of a response in a box coloured by its value.

All responses share one colour scale: white at zero, blue above, orange below. `dvpo score --heatmap` writes the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dvpo.errors import InputError
from dvpo.files import write_text
from reproduce import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)  # blue and orange of Okabe and Ito
MAX_DRAWN, PROMPT_LINES = 600, 6  # tokens in a drawing, lines of a prompt in it: more is too tall to look at
MAX_HEIGHT = 28_000  # points; a PNG ends at 65,536 pixels, which are 31,457

# The picture, in points. Its font (it comes with matplotlib) is monospaced: a text's width is known beforehand.
WIDTH, MARGIN, FONT, SMALL, LINE, PAD, GAP, LEGEND = 600.0, 12.0, 9.0, 6.5, 28.0, 3.0, 2.0, 34.0
FAMILY, ADVANCE = "DejaVu Sans Mono", 0.602  # the advance of a character is in parts of the font size

CSS = """
.token-picture { font: 15px/1.9 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.token-picture .prompt { color: #555; white-space: pre-wrap; line-height: 1.4; margin: 0 0 .4em; }
.token-picture .token { white-space: pre-wrap; border: 1px solid #ccc; border-radius: 3px; padding: 1px 2px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.token-picture .bar { display: flex; justify-content: space-between; max-width: 20em; border: 1px solid #999; }
.token-picture * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
"""


@dataclass(frozen=True)
class Scored:
    """One response with, for each of its tokens, the text, the value at it (`q`) and the value before it (`v`)."""

    label: str
    prompt: str
    tokens: list[str]
    q: list[float]
    v: list[float]

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.q) == len(self.v):
            raise ValueError(f"{self.label}: {len(self.tokens)} tokens, {len(self.q)} q and {len(self.v)} v")
        if not all(map(math.isfinite, [*self.q, *self.v])):
            raise ValueError(f"{self.label}: a value is not a finite number")


def limit(responses: Sequence[Scored]) -> float:
    """The end of the shared scale: the largest |q|, or 1 where every q is zero."""
    return max((abs(q) for response in responses for q in response.q), default=0.0) or 1.0


def colour(q: float, end: float) -> str:
    """The box's colour as #rrggbb: white at zero, blue at `end`, orange at -`end`."""
    share = min(abs(q) / end, 1.0)
    red, green, blue = (round(255 + (c - 255) * share) for c in (POSITIVE if q > 0 else NEGATIVE))
    return f"#{red:02x}{green:02x}{blue:02x}"


def html(responses: Sequence[Scored]) -> str:
    """A fragment for a page, all text escaped; the numbers of a token show when the pointer is on it."""
    end = limit(responses)
    ends = [colour(q, end) for q in (-end, 0.0, end)]
    labels = zip(ends, (f"{-end:.2f}", "q = 0", f"+{end:.2f}"), strict=True)
    bar = "".join(f'<span style="color:{_ink(back)}">&nbsp;{label}&nbsp;</span>' for back, label in labels)
    parts = [f'<div class="token-picture">\n<style>{CSS}</style>\n']
    parts.append(f'<div class="bar" style="background:linear-gradient(to right,{",".join(ends)})">{bar}</div>\n')
    for response in responses:
        prompt = "\n".join(map(_visible, response.prompt.split("\n")))
        parts.append(f'<h4>{escape(_visible(response.label))}</h4>\n<div class="prompt">{escape(prompt)}</div>\n<div>')
        parts.extend(_box(*token, end) for token in zip(response.tokens, response.q, response.v, strict=True))
        parts.append("</div>\n" if response.tokens else "(empty response)</div>\n")
    return "".join(parts) + "</div>\n"


def draw(responses: Sequence[Scored], path: Path) -> tuple[Path, Path]:
    """Writes `path`.svg and `path`.png and returns the two. Raises InputError if the picture would be too long."""
    with figures.style():
        return figures.save(_figure(responses), path)


def write(responses: Sequence[Scored], path: Path) -> None:
    """Writes one file: a whole page for .html, a drawing for .png and .svg. Raises InputError for another suffix."""
    if path.suffix == ".html":
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Token values</title>'
        body = f'<body style="margin: 1.5em auto; max-width: 60em; padding: 0 1em">\n{html(responses)}</body>'
        write_text(path, f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n')
    elif path.suffix in (".png", ".svg"):
        with figures.style():
            figures.save_one(_figure(responses), path)
    else:
        raise InputError(f"{path}: a token picture cannot be written as '{path.suffix}'; use .html, .png or .svg")


def _visible(text: str, known: frozenset[int] | None = None) -> str:
    """The text with a sign for each line break, and an escape for what has no shape of its own or is not `known`."""
    kept = {c for c in text if c.isprintable() and (known is None or ord(c) in known)}
    return "".join("⏎" if c == "\n" else c if c in kept else c.encode("unicode_escape").decode() for c in text)


def _ink(background: str) -> str:
    """Black or white, whichever is easier to read on the background (contrast by luminance, as in WCAG 2)."""
    red, green, blue = ((int(background[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _box(token: str, q: float, v: float, end: float) -> str:
    text, back = escape(_visible(token)), colour(q, end)
    title = f"“{text}”&#10;q = {q:.4f}&#10;v = {v:.4f}&#10;q − v = {q - v:.4f}"
    # <wbr>: a line may break between two tokens that no space separates.
    after = "<br>\n" if "\n" in token else "<wbr>"
    return f'<span class="token" style="background:{back};color:{_ink(back)}" title="{title}">{text}</span>{after}'


class _Placed(NamedTuple):
    """A text at (x, y), in points from the top left; a token's has a `q`, its box's width, and its number."""

    x: float
    y: float
    text: str
    q: float | None = None
    width: float = 0.0
    number: str = ""


def _place(responses: Sequence[Scored]) -> Iterator[_Placed]:
    """Every text of the picture from top to bottom, then an empty one at the bottom."""
    known, y, right = _characters(), MARGIN + LEGEND, WIDTH - MARGIN
    per_line = int((right - MARGIN - 2 * PAD) / (FONT * ADVANCE))
    for response in responses:
        prompt = [cut for line in response.prompt.split("\n") for cut in _cuts(_visible(line, known), per_line)]
        prompt[PROMPT_LINES:] = ["…"] if len(prompt) > PROMPT_LINES else []
        for line in [_visible(response.label, known)[:per_line], *prompt]:
            yield _Placed(MARGIN, y, line)
            y += FONT * 1.5
        x, y = MARGIN, y + 4
        for token, q in zip(response.tokens, response.q, strict=True):
            # Only a token longer than a line has more than one cut; its number stands under the first.
            for cut, text in enumerate(_cuts(_visible(token, known), per_line)):
                number = f"{q:.2f}" if cut == 0 else ""
                width = max(len(text) * FONT, len(number) * SMALL) * ADVANCE + 2 * PAD
                if x + width > right:
                    x, y = MARGIN, y + LINE
                yield _Placed(x, y, text, q, width, number)
                x += width + GAP
            if "\n" in token:
                x, y = MARGIN, y + LINE
        y += LINE + MARGIN
    yield _Placed(MARGIN, y, "")


def _cuts(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


@functools.cache
def _characters() -> frozenset[int]:
    """The characters the picture's font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FAMILY)).get_charmap())


def _figure(responses: Sequence[Scored]) -> Figure:
    """The picture on a page as high as it needs. To be called inside `figures.style()`."""
    count, placed, end = sum(len(r.tokens) for r in responses), list(_place(responses)), limit(responses)
    height = placed[-1].y
    if count > MAX_DRAWN or height > MAX_HEIGHT:
        raise InputError(f"{count} tokens are too much for a drawing (at most {MAX_DRAWN}, less if long): use .html")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    text = functools.partial(axes.text, family=FAMILY, va="baseline")
    for step in range(101):
        back = colour((step - 50) / 50 * end, end)
        axes.add_patch(Rectangle((MARGIN + 2 * step, MARGIN), 2.2, 10, facecolor=back, linewidth=0))
    for x, label, side in ((0, f"{-end:.2f}", "left"), (101, "q = 0", "center"), (202, f"+{end:.2f}", "right")):
        text(MARGIN + x, MARGIN + 20, label, size=SMALL, ha=side)
    for p in placed:
        if p.q is None:
            text(p.x, p.y + FONT, p.text, size=FONT, color=figures.GREY)
            continue
        back = colour(p.q, end)
        axes.add_patch(Rectangle((p.x, p.y), p.width, FONT + 6, facecolor=back, edgecolor="#bbbbbb", linewidth=0.5))
        text(p.x + PAD, p.y + FONT + 1.5, p.text, size=FONT, color=_ink(back))
        text(p.x + p.width / 2, p.y + FONT + 13.5, p.number, size=SMALL, color="#333333", ha="center")
    return figure
