"""Stages that train: each reads its settings into the trainer's own and calls it."""

import random
from typing import Any

from dvpo import models
from dvpo.config import GvmSettings, RewardSettings
from dvpo.data.pairs import EncodedPair, Encoder, preference_picks
from dvpo.data.records import load_examples
from dvpo.files import write_json
from reproduce.pipeline import Context


def rm(ctx: Context) -> dict[str, Any]:
    """A ScalarRM on preference pairs. Inputs: start, data. Settings: train, pairs."""
    from dvpo.training.reward import train_reward

    settings = RewardSettings(**ctx.settings["train"])
    encoder, pairs = _pairs(ctx, settings)
    encoded = [EncodedPair(better, worse, pick.example) for (pick, better), (_, worse) in pairs]
    metrics = train_reward(ctx.inputs["start"], encoded, settings, ctx.out, ctx.state, ctx.seed)
    return {**metrics, "pairs": len(pairs), "said": encoder.notes.lines(), "tokens": _tokens(pairs)}


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
    return {**metrics, "texts": len(texts), "pairs": len(pairs), "said": encoder.notes.lines(), "tokens": _tokens(pairs)}


def _pairs(ctx: Context, settings: Any, trajectory_k: int = 0) -> tuple[Encoder, list[Any]]:
    """The encoder and the pairs of a stage: settings pairs {split, per_prompt, most}."""
    from dvpo.training.gvm_data import encodable_pairs

    choice = ctx.settings["pairs"]
    examples = load_examples(ctx.inputs["data"] / f"{choice['split']}.jsonl")
    encoder = Encoder(
        models.load_tokenizer(ctx.inputs["start"]),
        examples,
        settings.max_prompt_tokens,
        settings.max_response_tokens,
        trajectory_k,
        ctx.seed,
    )
    picks = preference_picks(examples, choice["per_prompt"], ctx.seed)
    random.Random(ctx.seed).shuffle(picks)
    return encoder, encodable_pairs(encoder, picks, choice["most"])


def _tokens(pairs: list[Any]) -> int:
    return sum(len(t.prompt_ids) + len(t.response_ids) for pair in pairs for _, t in pair)
