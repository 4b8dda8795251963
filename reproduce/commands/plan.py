"""`dvpo plan`: predicted memory and time of every stage on a described cluster, and what to change where it breaks."""

from dataclasses import asdict
from typing import Any

from dvpo.errors import InputError
from reproduce.commands.common import by_text, print_json, table_text


def run(
    recipe_name: str | None,
    model: str | None,
    cluster_name: str | None,
    gpus: int | None,
    memory_gb: float | None,
    zero: int | None,
    response_tokens: int | None,
    vllm_share: float,
    as_json: bool,
) -> None:
    """Plans and prints. Raises InputError for an unknown recipe, model or cluster, or a recipe that trains nothing."""
    from reproduce import recipe as recipes
    from reproduce.cost import hardware, shapes, stages
    from reproduce.cost.planner import Wish, plan

    if recipe_name is None and model is None:
        raise InputError(f"name a recipe with --recipe ({', '.join(recipes.names())}), or a model with --model")
    recipe = recipes.load(recipe_name) if recipe_name else None
    own = cluster_name is None and gpus is None and memory_gb is None and model is None
    if recipe is not None and cluster_name is None:
        cluster = stages.cluster_of(recipe.compute, gpus, memory_gb)
    else:
        cluster = hardware.find(cluster_name or "8xa100-80gb", gpus, memory_gb)
    shape = shapes.find(model) if model else None
    if recipe is not None:
        planned = stages.of_recipe(recipe, shape)
        if own and zero is None:
            zero = stages.zero_of(recipe.compute)
    else:
        assert shape is not None  # else there was no recipe and no model
        planned = stages.of_model(shape, cluster)
    if not planned:
        raise InputError(f"recipe {recipe_name} trains nothing, so there is nothing to plan; name another one")
    wish = Wish(zero, response_tokens, vllm_share)
    rows = [plan(stage, cluster, wish) for stage in planned]
    document = {
        "recipe": recipe_name,
        "model": asdict(planned[0].shape),
        "cluster": asdict(cluster),
        "stages": rows,
        "hours": _total(rows),
        "fits": all(row["fits"] for row in rows),
    }
    if as_json:
        print_json(document)
    else:
        print(_text(document))


def _total(rows: list[dict[str, Any]]) -> list[float] | None:
    """Hours of all stages that are not optional and whose number of updates is known, one after another."""
    known = [row["hours"] for row in rows if row["hours"] is not None and not row["optional"]]
    return [round(sum(hours[i] for hours in known), 3) for i in (0, 1)] if known else None


def _text(document: dict[str, Any]) -> str:
    cluster, rows = document["cluster"], document["stages"]
    count = cluster["per_node"] * cluster["nodes"]
    lines = [
        f"{document['model']['name']}, {rows[0]['parameters'] / 1e6:,.4g} M parameters, on {cluster['name']}: "
        f"{count} of {cluster['device']['name']}, {rows[0]['limit_gib']:g} GiB usable on each"
    ]
    header = ("stage", "fits", "spread", "batch", "pass (most)", "peak GiB", "in", "s/update", "hours")
    cells = [
        (
            f"{row['stage']}{' (optional)' if row['optional'] else ''}",
            "yes" if row["fits"] else "no",
            _spread(row),
            str(row["batch"]),
            f"{row['micro_batch']} ({row['largest_micro_batch'] or '-'})",
            f"{row['peak']['gib']:.2f}",
            row["peak"]["phase"],
            _range(row["seconds_per_update"]),
            _range(row["hours"]),
        )
        for row in rows
    ]
    lines += [table_text(header, cells, left=(0, 1, 2, 6)), ""]
    lines += by_text((row["stage"], _answer(row, cluster["device"]["name"])) for row in rows)
    lines += by_text((row["stage"], row["uneven"]) for row in rows if row["uneven"])
    lower = [row for row in rows if row["fits"] and row["least_zero"] < row["zero"]]
    if lower:
        named = ", ".join(f"{row['stage']} ({row['least_zero']})" for row in lower)
        lines.append(f"a lower stage of ZeRO fits too: {named}")
    if document["hours"]:
        lines.append(f"in all: {_range(document['hours'])} hours (one seed; stages with a known number of updates)")
    low, high = (f"{share:.0%}" for share in cluster["device"]["reached"])
    lines.append(f"times: at {high} and at {low} of the device's best arithmetic, every text at its full length")
    return "\n".join(lines)


def _spread(row: dict[str, Any]) -> str:
    """ZeRO's stage and what else saves memory."""
    parts = [f"ZeRO-{row['zero']}" if row["zero"] else "whole"]
    parts += ["recomputed"] * row["checkpointing"] + ["offloaded"] * row["offload"]
    return " + ".join(parts + ["frozen sharded"] * (row["frozen"] == "sharded"))


def _answer(row: dict[str, Any], device: str) -> str:
    """What breaks first and what to do about it, in one line."""
    part, phase = row["breaks_first"]["part"], row["peak"]["phase"]
    if row["fits"]:
        return f"{part} would break first, in '{phase}': {row['advice']}"
    needed = row["devices_needed"]
    way = f"{needed} of {device} would do" if needed else f"no number of {device} holds it as it is"
    return f"too large by its {part}, in '{phase}': {row['advice']}; {way}"


def _range(numbers: list[float] | None) -> str:
    return "-" if numbers is None else f"{numbers[0]:.3g} - {numbers[1]:.3g}"
