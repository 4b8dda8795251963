"""`dvpo reproduce --dry-run`: what would run and why, and for a recipe that names its machine, what it would take."""

from reproduce import app
from reproduce.commands.common import by_text, print_json, table_text
from reproduce.graphs.outline import Line, Outline, outline
from reproduce.pipeline import plan
from reproduce.recipe import DataRecipe


def run(request: app.Request, as_json: bool) -> None:
    """Prints the plan. With `--json`, a list of stages with their resolved settings."""
    prepared = app.prepare(request)
    planned = plan(prepared.stages, prepared.out / "stages")
    found = outline(prepared.recipe, prepared.stages)
    if as_json:
        print_json([_row(p.state, p.why, line) for p, line in zip(planned, found.lines, strict=True)])
        return
    if found.machine is not None and isinstance(prepared.recipe, DataRecipe):
        print(f"{_settings(prepared.recipe)}\n")
    print(table_text(("stage", "state", "why"), [(p.id, p.state, p.why) for p in planned], left=(0, 1, 2)))
    if found.machine is not None:
        print(f"\n{_text(found)}")
    elif found.unknown is not None:
        print(f"\nnothing is predicted: {found.unknown}")


def _row(state: str, why: str, line: Line) -> dict[str, object]:
    memory = None if line.memory is None else {"peak": line.memory[0], "usable": line.memory[1], "fits": line.fits}
    said = {"id": line.id, "state": state, "why": why, "command": line.command, "settings": line.settings}
    return said | {"memory_gib": memory, "hours": line.hours, "disk_gb": line.disk, "wrong": line.wrong}


def _settings(recipe: DataRecipe) -> str:
    """The whole recipe as it was resolved."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True).rstrip()


def _text(found: Outline) -> str:
    rows = [
        (
            line.id,
            line.command,
            "-" if line.memory is None else " of ".join(map(_number, line.memory)) + ("" if line.fits else " (!)"),
            "-" if line.hours is None else " - ".join(map(_number, line.hours)),
            "-" if line.disk is None else _number(line.disk),
        )
        for line in found.lines
    ]
    said = [table_text(("stage", "command", "GiB", "hours", "GB"), rows, left=(0, 1)), ""]
    said += [f"(!) {text}" for text in by_text((line.id, wrong) for line in found.lines for wrong in line.wrong)]
    if unknown := [line.id for line in found.lines if line.memory and line.hours is None]:
        said.append(f"hours unknown, as the recipe does not say what its data holds: {', '.join(unknown)}")
    if found.hours:
        low, high = map(_number, found.hours)
        said.append(
            f"predicted, not measured: {low} to {high} hours of training on {found.machine} (generation at full "
            "length; evaluation not counted); GiB is the peak of a device and what is usable"
        )
    if found.disk:
        said.append(
            f"disk: {_number(found.disk[0])} GB of results, and up to {_number(found.disk[1])} GB for a trainer's state"
        )
    return "\n".join(said)


def _number(value: float) -> str:
    """Whole numbers, and two digits of smaller ones."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
