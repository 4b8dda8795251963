"""`dvpo reproduce --dry-run`: what would run and why, and for a recipe that names its machine, what it would take."""

from reproduce import app
from reproduce.commands.common import print_json, table_text
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
    states = [(p.id, p.state, p.why) for p in planned]
    if isinstance(prepared.recipe, DataRecipe) and prepared.recipe.hub is not None:
        print(f"{_settings(prepared.recipe)}\n")
        print(f"{table_text(('stage', 'state', 'why'), states, left=(0, 1, 2))}\n\n{_text(prepared.recipe, found)}")
    else:
        print(table_text(("stage", "state", "why"), states, left=(0, 1, 2)))


def _row(state: str, why: str, line: Line) -> dict[str, object]:
    memory = None if line.memory is None else {"peak": line.memory[0], "usable": line.memory[1], "fits": line.fits}
    said = {"id": line.id, "state": state, "why": why, "command": line.command, "settings": line.settings}
    return said | {"memory_gib": memory, "hours": line.hours, "disk_gb": line.disk}


def _settings(recipe: DataRecipe) -> str:
    """The whole recipe as it was resolved."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True).rstrip()


def _text(recipe: DataRecipe, found: Outline) -> str:
    rows = [
        (
            line.id,
            line.command,
            "-"
            if line.memory is None
            else f"{line.memory[0]:.0f} of {line.memory[1]:.0f}{'' if line.fits else ' (!)'}",
            "-" if line.hours is None else f"{line.hours[0]:.0f} - {line.hours[1]:.0f}",
            "-" if line.disk is None else f"{line.disk:.0f}",
        )
        for line in found.lines
    ]
    said = [table_text(("stage", "command", "GiB", "hours", "GB"), rows, left=(0, 1)), ""]
    c = recipe.compute
    if found.hours:
        low, high = found.hours
        said.append(
            f"predicted, not measured: {low:.0f} to {high:.0f} hours of training on {c.cluster} (generation at full "
            "length; evaluation not counted); GiB is the peak of a device and what is usable"
        )
    if found.disk:
        said.append(f"disk: {found.disk[0]:.0f} GB of results, and up to {found.disk[1]:.0f} GB for a trainer's state")
    return "\n".join(said)
