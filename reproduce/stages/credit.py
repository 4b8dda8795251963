"""The stage that asks whether token values find the wrong word of an answer, in the atlas world."""

import json
import random
from typing import Any

import torch

from dvpo import models
from dvpo.data.atlas_score import Judge
from dvpo.data.pairs import Encoder, Pick
from dvpo.data.records import load_examples
from dvpo.errors import InputError
from dvpo.evaluation.credit import Marked, Reading, credit_table
from dvpo.files import write_json
from dvpo.values import score_all
from reproduce.pipeline import Context


def credit(ctx: Context) -> dict[str, Any]:
    """Where a model puts the blame, against the judge's wrong words. Inputs: model, data, atlas.

    Settings: split, per_prompt (responses of each example, a seeded choice), max_prompt_tokens, max_response_tokens,
    subfolder ("critic" for the critic that a PPO stage keeps below its policy, else ""). The atlas tokenizer has a
    token per word, so a wrong word's index is its token's. Texts over a limit are left out.
    """
    s = ctx.settings
    folder = ctx.inputs["model"] / s["subfolder"]
    role = models.role_of(folder)
    model: Any = models.load(folder, "reward" if role == "reward" else "value")
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer: Any = models.load_tokenizer(folder)
    examples = load_examples(ctx.inputs["data"] / f"{s['split']}.jsonl")
    encoder = Encoder(tokenizer, examples, s["max_prompt_tokens"], s["max_response_tokens"])
    judge = Judge(json.loads((ctx.inputs["atlas"] / "world.json").read_text(encoding="utf-8")))
    rng = random.Random(ctx.seed)
    texts, truths, left_out = [], [], 0
    for i, example in enumerate(examples):
        n = len(example.responses)
        for j in sorted(rng.sample(range(n), min(s["per_prompt"], n))):
            words = example.responses[j].text
            text = encoder.text(Pick(i, j))
            if text is None or text.response_ids[-1] != tokenizer.eos_token_id:
                left_out += 1
                continue
            if len(text.response_ids) != len(words.split()) + 1:
                raise InputError(
                    f"{example.origin}: response {j} has not one token per word; give a model of the atlas"
                )
            texts.append(text)
            truths.append((judge.judge(example.prompt[-1]["content"], words).wrong_words, i))
    if not any(wrong for wrong, _ in truths):
        raise InputError(
            f"{ctx.inputs['data']}: no chosen answer of split {s['split']} has a wrong word; take more of them"
        )
    values = dict(score_all(model, texts, tokenizer.pad_token_id))
    marked = [Marked(values[k], *truth) for k, truth in enumerate(truths)]
    reading: Reading = "spread score" if role == "reward" else "value steps"
    table = {"reading": reading, **credit_table(marked, reading), "left_out": left_out}
    write_json(ctx.out / "credit.json", table)
    return table
