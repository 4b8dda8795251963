"""What `dvpo bench` measured, for readers: a table of each result, and one page of pictures of a folder of them."""

import html
import json
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import atomic_write
from reproduce import figures
from reproduce.figures import Bar
from reproduce.report import inline_svg

PAGE = "bench.html"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}td,th{padding:.2rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
    "code{background:#f4f4f4;padding:.1rem .3rem}.about{color:#555;font-size:.9rem}.wide{overflow-x:auto}"
)


@dataclass(frozen=True)
class Shown:
    """A result as a table; `notes` are sentences below it."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def server(result: dict[str, Any]) -> Shown:
    """Of `dvpo bench server`."""
    other = result["against"]
    rows = [
        (
            row["workload"],
            *(_spread(row[name], 0) for name in ("ours_tokens_per_second", "other_tokens_per_second")),
            _spread(row["ratio"], 2),
            *(_waits(row[name]) for name in ("ours_seconds", "other_seconds")),
        )
        for row in result["workloads"]
    ]
    rates = ("server, tokens/s", f"{other}, tokens/s", f"server / {other}")
    note = (
        f"{result['dtype']}, {result['cores']} cores, {result['rounds']} rounds in turns; median (range); "
        f"largest difference of a value {result['largest_difference']:.1e}"
    )
    head = ("workload", *rates, "server, p50 and p99 s", f"{other}, p50 and p99 s")
    return Shown(f"The scoring server beside {_PEERS[other]}, {result['dtype']}", head, rows, [note])


def gvm(result: dict[str, Any]) -> Shown:
    """Of `dvpo bench gvm`."""
    rows = [
        (
            name,
            _spread(row["tokens_per_second"], 0),
            _spread(row["texts_per_second"], 2),
            f"{row['computed_per_token']['median']:.2f}",
            f"{row['memory_mb']:.0f}",
        )
        for name, row in result["trainers"].items()
    ]
    notes = []
    if "memory_ratio" in result:
        speeds = [f"{_spread(result[f'{what}_per_second_ratio'], 2)} by {what}" for what in ("tokens", "texts")]
        notes.append(f"ours / trl: speed {', '.join(speeds)}; memory {result['memory_ratio']:.2f}")
    head = ("trainer", "tokens/s", "texts/s", "computed per token", "peak memory, MB")
    title = f"Training a value model, {result['batch_texts']} texts a step, {result['precision']}"
    return Shown(title, head, rows, notes)


def policy(result: dict[str, Any]) -> Shown:
    """Of `dvpo bench policy`."""
    rows = [
        (
            name,
            _spread(row["seconds"], 2),
            f"{row['memory_mb']:.0f}",
            ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items() if seconds >= 0.005),
        )
        for name, row in result["methods"].items()
    ]
    notes = [
        f"{name}: {_spread(row['seconds'], 2)} of the time, {row['memory']:.2f} of the memory"
        for name, row in result["ratios"].items()
    ]
    size = f"{result['prompts_per_update']} prompts, at most {result['max_new_tokens']} new tokens"
    title = f"An update of the policy: {size}, {result['precision']}"
    return Shown(title, ("method", "seconds", "peak memory, MB", "where the time goes"), rows, notes)


def growth(result: dict[str, Any]) -> Shown:
    """Of `dvpo bench growth`."""
    rows = [
        (
            _grows(fit),
            f"{fit['exponent']:.2f}",
            f"{fit['predicted_exponent']:.2f}",
            f"{fit['largest_error']:.0%}",
        )
        for fit in result["fits"]
    ]
    head = ("training", "exponent", "cost model's", "largest error of the fit")
    return Shown(f"How cost grows, {result['precision']}", head, rows)


def write(folder: Path) -> Path:
    """Writes `folder`/bench.html from the JSON files of `dvpo bench` in it, in the order of their names.

    Raises InputError where there are none, or one cannot be read.
    """
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, path in enumerate(sorted(folder.glob("*.json"))):
            result = _read(path)
            kind = next((kind for kind in _KINDS if kind.key in result), None)
            if kind is None:  # another kind of measurement
                continue
            try:
                pictures = kind.draw(result, Path(scratch) / str(number))
                parts.append(_part(path.name, result, kind.show(result), pictures, f"b{number}-"))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: not a whole result of `dvpo bench` ({error}); measure it again") from error
    if not parts:
        raise InputError(
            f"{folder}: no results there; write some with `dvpo bench ... --json > {folder / 'NAME.json'}`"
        )
    title = "What was measured side by side"
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f"{''.join(parts)}</body></html>\n"
    )
    with atomic_write(folder / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / PAGE


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _part(name: str, result: dict[str, Any], shown: Shown, pictures: Sequence[Path], prefix: str) -> str:
    """One result of the page."""

    def line(cell: str, row: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{cell}>{html.escape(text)}</{cell}>' for text in row)}</tr>"

    drawn = "".join(
        f"<p>{inline_svg(path.read_text(encoding='utf-8'), f'{prefix}{number}-')}</p>"
        for number, path in enumerate(pictures)
    )
    table = f"<table>{line('th', shown.head)}{''.join(line('td', row) for row in shown.rows)}</table>"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in shown.notes)
    about = [f"<code>{html.escape(result.get('command', name))}</code>", html.escape(_machine(result))]
    return (
        f"<section><h2>{html.escape(shown.title)}</h2>{drawn}<div class=wide>{table}</div>{notes}"
        f'<p class="about">{html.escape(name)}: {"; ".join(filter(None, about))}</p></section>'
    )


def _machine(result: dict[str, Any]) -> str:
    if "machine" not in result:
        return ""
    where = result["machine"]
    device = ", ".join(f"{name} {value}" for name, value in where["device"].items() if value)
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers", "trl"))
    return f"{device}; {versions}; commit {where['git_commit'][:12]}"


def _draw_server(result: dict[str, Any], stem: Path) -> list[Path]:
    rows = [_bar(row["workload"], row["ratio"]) for row in result["workloads"]]
    other = result["against"]
    return [figures.bars(rows, stem, f"tokens a second, times {_PEERS[other]}", 1.0, f"as fast as {_PEERS[other]}")[0]]


def _draw_gvm(result: dict[str, Any], stem: Path) -> list[Path]:
    rows = [_bar(name, row["tokens_per_second"]) for name, row in result["trainers"].items()]
    return [figures.bars(rows, stem, "training tokens a second")[0]]


def _draw_policy(result: dict[str, Any], stem: Path) -> list[Path]:
    rows = [_bar(name, row["seconds"]) for name, row in result["methods"].items()]
    whole = [(name, _thirds(row["phases"])) for name, row in result["methods"].items()]
    drawn = [figures.bars(rows, stem, "seconds an update")[0]]
    return [
        *drawn,
        figures.shares(whole, stem.with_name(f"{stem.name}-shares"), ("answering", "judging", "learning"))[0],
    ]


def _thirds(phases: dict[str, float]) -> tuple[float, float, float]:
    """Shares of answering, judging and learning."""
    learning = sum(phases.get(name, 0.0) for name in ("forward", "backward", "optimiser"))
    total, generate = sum(phases.values()), phases["generate"]
    return generate / total, (total - generate - learning) / total, learning / total


def _draw_growth(result: dict[str, Any], stem: Path) -> list[Path]:
    rows = []
    for fit in result["fits"]:
        rows.append(Bar(label=_grows(fit), value=fit["exponent"], low=None, high=None))
        rows.append(Bar(label="cost model", value=fit["predicted_exponent"], low=None, high=None))
    return [figures.bars(rows, stem, "exponent: 1 is in proportion")[0]]


def _grows(fit: dict[str, Any]) -> str:
    return f"{fit['kind']}: {fit['what'].replace('memory_mb', 'memory')} by {fit['axis']}"


def _bar(label: str, numbers: dict[str, float]) -> Bar:
    return Bar(label=textwrap.fill(label, 42), value=numbers["median"], low=numbers["low"], high=numbers["high"])


def _waits(seconds: dict[str, float] | None) -> str:
    return "" if seconds is None else f"{seconds['p50']:.2f}, {seconds['p99']:.2f}"


def _spread(numbers: dict[str, float], digits: int) -> str:
    median, low, high = (f"{numbers[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


_PEERS = {"bare": "a bare padded forward pass", "vllm": "vLLM"}


@dataclass(frozen=True)
class _Kind:
    """A kind of result, known by a key of its own."""

    key: str
    show: Callable[[dict[str, Any]], Shown]
    draw: Callable[[dict[str, Any], Path], list[Path]]


_KINDS = (
    _Kind("workloads", server, _draw_server),
    _Kind("trainers", gvm, _draw_gvm),
    _Kind("methods", policy, _draw_policy),
    _Kind("fits", growth, _draw_growth),
)
