"""Stages behind the figures: token values of two answers, and the sweep of Lemma 3.1."""

import json
from typing import Any

from dvpo import models
from dvpo.data.records import Response, load_examples
from dvpo.data.templates import encode
from dvpo.files import write_json
from dvpo.values import score_all
from reproduce.pipeline import Context

QUESTION = "As an island, is Beijing located in Asia?"
ANSWERS = {
    "response 1": "Beijing is not an island. It is a city in northern China, and China is located in Asia.",
    "response 2": "Yes, Beijing is an island located in Asia. It is an island off the coast of China.",
}
"""The paper's question (Appendix D) with two answers of our own: it is not an island, it is."""


def token_values(ctx: Context) -> dict[str, Any]:
    """h_0..h_T of two answers. Inputs: model; with data and atlas, a right and a wrong answer of the built-in world.

    Settings: split (of the built-in data), or None for the paper's question.
    """
    model, tokenizer = models.load(ctx.inputs["model"], "value"), models.load_tokenizer(ctx.inputs["model"])
    question, answers = _built_in(ctx) if ctx.settings["split"] else (QUESTION, ANSWERS)
    texts = [encode(tokenizer, [{"role": "user", "content": question}], answer) for answer in answers.values()]
    values = dict(score_all(model, texts, tokenizer.pad_token_id))
    shown = [
        {
            "label": label,
            "prompt": question,
            "tokens": [tokenizer.decode([i]) for i in texts[n].response_ids],
            "q": values[n][1:].tolist(),
            "v": values[n][:-1].tolist(),
        }
        for n, label in enumerate(answers)
    ]
    write_json(ctx.out / "tokens.json", shown)
    return {"mean": {item["label"]: sum(item["q"]) / len(item["q"]) for item in shown}}


def lemma(ctx: Context) -> dict[str, Any]:
    """The gap of the two policy gradients over shrinking errors. Settings: seeds, the number of random MDPs."""
    from dvpo.objectives.lemma import sweep

    rows = sweep([10.0**-k for k in (0, 0.5, 1, 1.5, 2, 2.5, 3, 4)], range(ctx.settings["seeds"]))
    write_json(ctx.out / "sweep.json", rows)
    return {"largest": rows[0], "smallest": rows[-1]}


def _built_in(ctx: Context) -> tuple[str, dict[str, str]]:
    """The first test question with a right answer and one that has exactly one wrong word."""
    from dvpo.data.atlas_score import Judge

    judge = Judge(json.loads((ctx.inputs["atlas"] / "world.json").read_text()))
    for example in load_examples(ctx.inputs["data"] / f"{ctx.settings['split']}.jsonl"):
        question = example.prompt[-1]["content"]

        def pick(
            wrong_words: int, question: str = question, responses: tuple[Response, ...] = example.responses
        ) -> str | None:
            for r in responses:
                judged = judge.judge(question, r.text)
                right = sum(s.verdict == "right" for s in judged.statements)
                if len(judged.wrong_words) == wrong_words and right >= 1 and len(judged.statements) >= 2:
                    return r.text
            return None

        right, wrong = pick(0), pick(1)
        if right and wrong:
            return question, {"right answer": right, "one wrong word": wrong}
    raise ValueError("no test question has both a right answer and one with a single wrong word")
