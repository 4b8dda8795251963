"""Table 6: the paper's cost forms beside what the online loop does, by its settings and as counted in a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dvpo.config import PolicySettings
from reproduce import paper
from reproduce.cost.work import METHODS

Counts = dict[str, dict[str, int]]
"""Per model (policy, critic, reference, value, reward): texts `generated`, `judged` (forward without gradient),
`learned` (forward with gradient) and `backward`."""

LABELS = {"ScalarRM": "rm", "GVM": "gvm", "PPO": "ppo", "ReMax": "remax", "GRPO": "grpo", "DVPO": "dvpo"}
_KINDS = ("generated", "judged", "learned", "backward")


def symbolic_table() -> list[dict[str, Any]]:
    """Table 6's rows {method, metric, paper, ours, agrees}; n is GRPO's number of responses per prompt.

    Costs are of one prompt and one epoch. Ours differ in one cell: our GRPO learns from all n responses.
    """
    published = {(c.method, c.metric): str(c.value) for c in paper.cells(6)}
    rows = []
    for label, name in LABELS.items():
        for metric, form in _forms(name).items():
            printed = published[label, metric]
            rows.append({"method": label, "metric": metric, "paper": printed, "ours": form, "agrees": form == printed})
    return rows


def counted_calls(settings: PolicySettings) -> Counts:
    """What one update of the online loop does, by its settings. An adapter's reference counts as the policy."""
    algorithm = settings.algorithm
    prompts = settings.prompts_per_update
    texts = prompts * (algorithm.group_size if algorithm.name == "grpo" else 1)
    greedy = prompts if algorithm.name == "remax" else 0
    learned = texts * settings.epochs
    policy = _counts(generated=texts + greedy, judged=texts, learned=learned, backward=learned)
    found = {"policy": policy}
    if settings.lora:
        policy["judged"] += texts
    else:
        found["reference"] = _counts(judged=texts)
    if algorithm.name == "dvpo":
        found["value"] = _counts(judged=texts)
    else:
        found["reward"] = _counts(judged=texts + greedy)
    if algorithm.name == "ppo":
        found["critic"] = _counts(judged=texts, learned=learned, backward=learned)
    return found


def table_6(settings: PolicySettings, counts: Counts | None = None) -> dict[str, float]:
    """Table 6's column of a method in its own units, from counts of one update (by default those of the settings).

    M_train and M_infer in models, C_gene in responses generated per prompt, C_back in texts learned from per prompt
    and epoch.
    """
    counts = counts or counted_calls(settings)
    trained = [c for c in counts.values() if c["backward"]]
    prompts = settings.prompts_per_update
    return {
        "M_train": len(trained),
        "M_infer": len(counts) - len(trained),
        "C_gene": sum(c["generated"] for c in counts.values()) / prompts,
        "C_back": sum(c["backward"] for c in counts.values()) / (prompts * settings.epochs),
    }


def count_calls(trainer: Any, updates: int = 1) -> Counts:
    """Runs `updates` updates of an OnlineTrainer and counts the texts that pass through each of its models."""
    models = {name: getattr(trainer, name) for name in ("policy", "critic", "reference", "value", "reward")}
    counts = {name: _counts() for name, model in models.items() if model is not None}
    with _counting({name: models[name] for name in counts}, trainer.engine, counts):
        for _ in range(updates):
            trainer.step()
    return counts


@contextmanager
def _counting(models: dict[str, Any], engine: Any, counts: Counts) -> Iterator[None]:
    """Counts while it lasts. The backbone is watched: some passes go around a model's own head."""
    from dvpo.values import unwrapped

    generating = False

    def counted(method: Any) -> Any:
        def run(prompts: Any, *arguments: Any) -> Any:
            nonlocal generating
            counts["policy"]["generated"] += len(prompts)
            generating = True
            try:
                return method(prompts, *arguments)
            finally:
                generating = False

        return run

    def watch(count: dict[str, int]) -> Any:
        def after_forward(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
            if generating:
                return
            hidden = output.last_hidden_state
            texts = hidden.shape[0]
            count["learned" if hidden.requires_grad else "judged"] += texts
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: count.__setitem__("backward", count["backward"] + texts))

        return after_forward

    handles = [
        unwrapped(model).base_model.register_forward_hook(watch(counts[name]), with_kwargs=True)
        for name, model in models.items()
    ]
    engine.sample, engine.greedy = counted(engine.sample), counted(engine.greedy)
    try:
        yield
    finally:
        del engine.sample, engine.greedy  # the class's own again
        for handle in handles:
            handle.remove()


def _forms(name: str) -> dict[str, str]:
    method = METHODS[name]
    trained, group = len(method.trained), name == "grpo"
    return {
        "M_train": _times(trained, "m_train"),
        "M_infer": _times(len(method.frozen), "m_infer"),
        "C_gene": "n*c_gene" if group else _times(method.generations, "c_gene"),
        "C_back": "n*c_back" if group else _times(trained, "c_back"),
    }


def _times(count: int, unit: str) -> str:
    return "-" if not count else unit if count == 1 else f"{count}*{unit}"


def _counts(**given: int) -> dict[str, int]:
    return dict.fromkeys(_KINDS, 0) | given
