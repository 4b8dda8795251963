"""Stages that train: each reads its settings into the trainer's own and calls it."""

import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dvpo import models
from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, SftSettings
from dvpo.data.pairs import EncodedPair, Encoder, Pick, preference_picks
from dvpo.data.records import Example, load_examples
from dvpo.errors import InputError
from dvpo.files import write_json
from reproduce.launch import Devices, run_stage
from reproduce.pipeline import Context

StageFunction = Callable[[Context], dict[str, Any]]


def in_processes(stage: StageFunction) -> StageFunction:
    """A stage that starts its processes itself where its settings say `compute: {processes, strategy}`."""

    @functools.wraps(stage)
    def run(ctx: Context) -> dict[str, Any]:
        from dvpo.distributed import launched

        compute = ctx.settings.get("compute")
        return run_stage(stage.__name__, ctx, Devices(**compute)) if compute and not launched() else stage(ctx)

    return run


@in_processes
def sft(ctx: Context) -> dict[str, Any]:
    """The SFT policy. Inputs: start, data. Settings: train, split, best.

    Every response of the split is a demonstration; with `best`, only the one of the highest score for each prompt.
    """
    from dvpo.training.sft import train_sft

    settings = SftSettings(**ctx.settings["train"])
    examples = load_examples(ctx.inputs["data"] / f"{ctx.settings['split']}.jsonl")
    encoder = _encoder(ctx, settings, examples)
    picks = [Pick(i, j) for i, e in enumerate(examples) for j in _demonstrations(e, ctx.settings.get("best", False))]
    texts = [text for pick in picks if (text := encoder.text(pick)) is not None]
    _require(texts, encoder)
    metrics = train_sft(ctx.inputs["start"], texts, settings, ctx.out, ctx.state, ctx.seed)
    return {**metrics, "texts": len(texts), "said": encoder.notes.lines()}


def _demonstrations(example: Example, best: bool) -> Sequence[int]:
    """The responses to learn from. One without a score is the best only where none has a score."""
    places = range(len(example.responses))
    if not best or not places:
        return places
    scores = [-math.inf if r.score is None else r.score for r in example.responses]
    return [max(places, key=scores.__getitem__)]


@in_processes
def dpo(ctx: Context) -> dict[str, Any]:
    """DPO on preference pairs. Inputs: start, data. Settings: train, pairs."""
    from dvpo.training.dpo import train_dpo

    settings = DpoSettings(**ctx.settings["train"])
    encoder, pairs = _pairs(ctx, settings)
    metrics = train_dpo(ctx.inputs["start"], _encoded(encoder, pairs), settings, ctx.out, ctx.state, ctx.seed)
    return {**metrics, "pairs": len(pairs), "said": encoder.notes.lines()}


@in_processes
def rm(ctx: Context) -> dict[str, Any]:
    """A ScalarRM on preference pairs. Inputs: start, data. Settings: train, pairs."""
    from dvpo.training.reward import train_reward

    settings = RewardSettings(**ctx.settings["train"])
    encoder, pairs = _pairs(ctx, settings)
    metrics = train_reward(ctx.inputs["start"], _encoded(encoder, pairs), settings, ctx.out, ctx.state, ctx.seed)
    return {**metrics, "pairs": len(pairs), "said": encoder.notes.lines(), "tokens": _tokens(pairs)}


@in_processes
def gvm(ctx: Context) -> dict[str, Any]:
    """A Global Value Model. Inputs: start, data, and rm where the rewards come from it. Settings: train, pairs."""
    from dvpo.training.gvm import train_gvm
    from dvpo.training.gvm_data import value_texts

    settings = GvmSettings(**ctx.settings["train"])
    encoder, pairs = _pairs(ctx, settings, settings.trajectory_k)
    reward_model = models.load(ctx.inputs["rm"], "reward") if settings.target == "reward_model" else None
    texts, scale = value_texts(
        pairs, settings.target, encoder.examples, reward_model, encoder.tokenizer.pad_token_id, settings.bf16
    )
    metrics = train_gvm(ctx.inputs["start"], texts, settings, ctx.out, ctx.state, ctx.seed)
    write_json(ctx.out / "reward_scale.json", scale)
    return {
        **metrics,
        "texts": len(texts),
        "pairs": len(pairs),
        "said": encoder.notes.lines(),
        "tokens": _tokens(pairs),
    }


def reward_scale(ctx: Context) -> dict[str, Any]:
    """Mean and standard deviation of a ScalarRM's raw scores over preference texts. Inputs: start (the RM), data.

    Settings: pairs, max_prompt_tokens, max_response_tokens. The online loop standardises its rewards with them.
    """
    from dvpo.training.gvm_data import value_texts

    encoder, pairs = _pairs(ctx, SimpleNamespace(**ctx.settings))
    model = models.load(ctx.inputs["start"], "reward")
    _, scale = value_texts(pairs, "reward_model", encoder.examples, model, encoder.tokenizer.pad_token_id)
    write_json(ctx.out / "scale.json", scale)
    return scale


@in_processes
def policy(ctx: Context) -> dict[str, Any]:
    """The online loop. Inputs: start, data; value, or reward and reward_scale; world for the gold curve.

    Settings: train, split (the prompts), most (at most so many prompts, drawn by the seed).
    """
    from dvpo.training.policy import Frozen, OnlineTrainer

    scale = (
        json.loads((ctx.inputs["reward_scale"] / "scale.json").read_text()) if "reward_scale" in ctx.inputs else None
    )
    frozen = Frozen(
        ctx.inputs.get("value"), ctx.inputs.get("reward"), (scale["mean"], scale["std"]) if scale else (0.0, 1.0)
    )
    prompts = [e.prompt for e in load_examples(ctx.inputs["data"] / f"{ctx.settings['split']}.jsonl")]
    if (most := ctx.settings.get("most")) is not None and most < len(prompts):
        prompts = random.Random(ctx.seed).sample(prompts, most)
    settings = PolicySettings(**ctx.settings["train"])
    monitor = gold_monitor(ctx.inputs["world"]) if "world" in ctx.inputs else None
    trainer = OnlineTrainer(ctx.inputs["start"], frozen, prompts, settings, ctx.seed, monitor)
    log = trainer.train(ctx.state)
    trainer.save(ctx.out)
    write_json(ctx.out / "curves.json", log)
    losses = [row["policy_loss"] for row in log]
    return {"last": log[-1], "updates": len(log), "policy_losses": losses, "said": trainer.said}


def gold_monitor(world: Path) -> Any:
    """Logs the mean gold score of every batch of rollouts: what the training itself never sees."""
    from dvpo.data.atlas_score import Judge

    judge = Judge(json.loads((world / "world.json").read_text()))

    def monitor(prompts: Any, texts: Any) -> dict[str, float]:
        scores = [judge.judge(p[-1]["content"], t).score for p, t in zip(prompts, texts, strict=True)]
        return {"gold": sum(scores) / len(scores)}

    return monitor


def _encoder(ctx: Context, settings: Any, examples: list[Any], trajectory_k: int = 0) -> Encoder:
    tokenizer = models.load_tokenizer(ctx.inputs["start"])
    return Encoder(
        tokenizer, examples, settings.max_prompt_tokens, settings.max_response_tokens, trajectory_k, ctx.seed
    )


def _encoded(encoder: Encoder, pairs: list[Any]) -> list[EncodedPair]:
    return [EncodedPair(better, worse, encoder.prompt_numbers[pick.example]) for (pick, better), (_, worse) in pairs]


def _pairs(ctx: Context, settings: Any, trajectory_k: int = 0) -> tuple[Encoder, list[Any]]:
    """The encoder and the pairs of a stage: settings pairs {split, per_prompt, most}."""
    from dvpo.training.gvm_data import encodable_pairs

    choice = ctx.settings["pairs"]
    examples = load_examples(ctx.inputs["data"] / f"{choice['split']}.jsonl")
    encoder = _encoder(ctx, settings, examples, trajectory_k)
    picks = preference_picks(examples, choice["per_prompt"], ctx.seed)
    random.Random(ctx.seed).shuffle(picks)
    pairs = encodable_pairs(encoder, picks, choice["most"])
    encoder.require_trajectories()
    _require(pairs, encoder)
    return encoder, pairs


def _require(found: Sequence[Any], encoder: Encoder) -> None:
    """Raises InputError where nothing is left to train on."""
    if not found:
        why = "; ".join(encoder.notes.lines()) or "nothing was in it"
        raise InputError(f"the data has no text to train on ({why}); raise the limits or give other data")


def _tokens(pairs: list[Any]) -> int:
    return sum(len(t.prompt_ids) + len(t.response_ids) for pair in pairs for _, t in pair)
