"""Stages of the built-in world: its texts, its base model, the SFT policy's own samples, and the gold score."""

import json
import random
from typing import Any

import numpy as np

from dvpo import models
from dvpo.config import ModelSize, PretrainSettings
from dvpo.data.atlas import POLICIES, Atlas, Question, build_tokenizer
from dvpo.data.atlas_score import Judge
from dvpo.data.atlas_text import ASSISTANT, EOS, REMARKS, USER, closing_remark
from dvpo.data.records import Example, Message, Response, dump_examples, load_examples
from dvpo.data.splits import check_disjoint
from dvpo.data.templates import encode_prompt
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.files import atomic_write, write_json
from dvpo.rollout.transformers import TransformersEngine
from reproduce.pipeline import Context
from reproduce.stages.remarks import remark_auroc

GENERATION_BATCH = 512
LESSONS_END, CONVERSATIONS_BEGIN = 0.8, 0.3
"""Where in the base model's corpus, from 0 to 1, the last lesson and the first conversation stand."""
REMARKED_LESSONS, REMARKED_PROMPTS = 600, 100
"""How many lessons, and the answers to how many prompts, measure what a base model knows."""


def atlas(ctx: Context) -> dict[str, Any]:
    """The world and its texts. Settings: world_seed, places, lessons, omissions, margin, prompts {split: how many}.

    Writes world.json, the tokenizer, corpus.json (the base model's documents in the order of training: `lessons`
    statements that are called right or wrong, `omissions` answers with a remark on what they leave out, and more and
    more conversations, one for every `base` prompt, with a reader's remark after every statement), and a file of
    examples per split: one demonstration per `sft` prompt by a random policy; the answers of all scripted policies,
    with gold scores and preferences, for `reward`, `validation` and `test`; bare prompts for `rl`.
    """
    s = ctx.settings
    world = Atlas.build(s["world_seed"], s["places"])
    build_tokenizer(world).save_pretrained(ctx.out / "tokenizer")
    write_json(ctx.out / "world.json", world.to_json())
    asked = world.questions(ctx.seed, sum(s["prompts"].values()) + s["omissions"])
    lessons = world.lessons(ctx.seed, s["lessons"])
    questions = iter(asked[s["omissions"] :])
    judge, rng = Judge(world.to_json()), random.Random(ctx.seed)
    splits: dict[str, list[Example]] = {}
    for name in sorted(s["prompts"]):
        count = s["prompts"][name]
        splits[name] = [_answered(world, judge, next(questions), f"{name}:{i}", rng, s["margin"]) for i in range(count)]
        if name != "base":
            dump_examples(splits[name], ctx.out / f"{name}.jsonl")
    check_disjoint(splits)
    conversations = [_with_remarks(judge, e.prompt[0]["content"], e.responses[0].text) for e in splits.pop("base")]
    partial = asked[: s["omissions"]]
    answers = world.partial_answers(ctx.seed, partial)
    lessons += [_with_last_remark(judge, q.text, a) for q, a in zip(partial, answers, strict=True)]
    write_json(ctx.out / "corpus.json", _curriculum(lessons, conversations, ctx.seed))
    test = splits["test"]
    longer = [
        (len(a.text) > len(b.text)) + 0.5 * (len(a.text) == len(b.text))
        for e in test
        for i, j in e.preferences
        for a, b in [(e.responses[i], e.responses[j])]
    ]
    return {
        "examples": {name: len(examples) for name, examples in splits.items()},
        "longer_wins": float(np.mean(longer)),
        "policy_scores": {
            p: float(np.mean([r.score or 0.0 for e in test for r in e.responses if r.policy == p])) for p in POLICIES
        },
    }


def base(ctx: Context) -> dict[str, Any]:
    """Pretrains a model from random weights on the world's corpus. Input: atlas. Settings: size, train.

    `remarks` in the metrics says how well the model foresees a reader's remarks (AUROC) on lessons that it has not
    read, on the statements of the `validation` answers, and on what those leave out.
    """
    from dvpo.training.pretrain import pretrain

    tokenizer = models.load_tokenizer(ctx.inputs["atlas"] / "tokenizer")
    start = ctx.state / "start"
    if not (start / "tokenizer.json").exists():
        models.save(models.new_policy(tokenizer, ModelSize(**ctx.settings["size"]), ctx.seed), tokenizer, start)
    corpus = json.loads((ctx.inputs["atlas"] / "corpus.json").read_text())
    texts = [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in corpus]
    settings = PretrainSettings(**ctx.settings["train"])
    remarks = {tokenizer.convert_tokens_to_ids(r.split()[0]): settings.remark_weight for r in REMARKS.values()}
    metrics = pretrain(start, texts, settings, ctx.out, ctx.state / "trainer", ctx.seed, remarks)
    return {**metrics, "remarks": _remarks(ctx, tokenizer)}


def _remarks(ctx: Context, tokenizer: Any) -> dict[str, float | None]:
    model = models.load(ctx.out, "policy").eval()
    world, judge = Atlas.from_json(json.loads((ctx.inputs["atlas"] / "world.json").read_text())), _judge(ctx)
    rows = load_examples(ctx.inputs["atlas"] / "validation.jsonl")[:REMARKED_PROMPTS]
    answers = [(e.prompt[0]["content"], r.text) for e in rows for r in e.responses]
    texts = {
        "lessons": (world.lessons(ctx.seed + 1, REMARKED_LESSONS), "right", "wrong"),
        "conversations": ([_with_remarks(judge, q, a) for q, a in answers], "right", "wrong"),
        "omissions": ([_with_last_remark(judge, q, a) for q, a in answers], "all", "and"),
    }
    return {name: remark_auroc(model, tokenizer, *of) for name, of in texts.items()}


def coverage(ctx: Context) -> dict[str, Any]:
    """Preference data with or without the SFT policy's own answers. Inputs: atlas, and sft where `own` > 0.

    Settings: own, the SFT policy's sampled answers per prompt, added to the scripted ones; margin; sampling. Writes
    reward.jsonl, validation.jsonl and test.jsonl in the form of the scripted files.
    """
    own = ctx.settings["own"]
    counts: dict[str, Any] = {}
    for offset, split in enumerate(("reward", "validation", "test")):
        examples = load_examples(ctx.inputs["atlas"] / f"{split}.jsonl")
        if own:
            texts = sample(ctx, ctx.inputs["sft"], [e.prompt for e in examples for _ in range(own)], offset)
            judge = _judge(ctx)
            for i, example in enumerate(examples):
                added = [_scored(judge, example.prompt, t, "sft") for t in texts[i * own : (i + 1) * own]]
                responses = [*example.responses, *added]
                examples[i] = _with_preferences(example.prompt, responses, example.origin, ctx.settings["margin"])
        dump_examples(examples, ctx.out / f"{split}.jsonl")
        counts[split] = {
            "responses": sum(len(e.responses) for e in examples),
            "preferences": sum(len(e.preferences) for e in examples),
        }
    return counts


def gold(ctx: Context) -> dict[str, Any]:
    """The gold score of a policy's sampled answers. Inputs: policy, atlas. Settings: split, and as in `sample`.

    Writes gold.jsonl, a row per prompt in the split's order, so that policies can be compared prompt by prompt.
    """
    prompts = [e.prompt for e in load_examples(ctx.inputs["atlas"] / f"{ctx.settings['split']}.jsonl")]
    texts = sample(ctx, ctx.inputs["policy"], prompts, 0)
    judge = _judge(ctx)
    rows: list[dict[str, Any]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        judgement = judge.judge(prompt[-1]["content"], text)
        rows.append(
            {"prompt": prompt[-1]["content"], "response": text, "gold": judgement.score, "words": len(text.split())}
        )
    with atomic_write(ctx.out / "gold.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
    mean, interval = mean_with_interval([r["gold"] for r in rows])
    return {"gold": mean, "ci95": list(interval), "n": len(rows), "words": float(np.mean([r["words"] for r in rows]))}


def sample(ctx: Context, policy: Any, prompts: list[tuple[Message, ...]], offset: int) -> list[str]:
    """One sampled response per prompt, as text. Settings: max_new_tokens, temperature."""
    tokenizer = models.load_tokenizer(policy)
    model = models.load(policy, "policy").eval()
    engine = TransformersEngine(model, tokenizer, ctx.settings["max_new_tokens"], ctx.settings["temperature"])
    ids = [encode_prompt(tokenizer, p) for p in prompts]
    texts: list[str] = []
    for start in range(0, len(ids), GENERATION_BATCH):
        seed = random.Random(f"{ctx.seed} {offset} {start}").getrandbits(31)
        responses = engine.generate(ids[start : start + GENERATION_BATCH], seed=seed)
        texts += [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
    return texts


def _judge(ctx: Context) -> Judge:
    return Judge(json.loads((ctx.inputs["atlas"] / "world.json").read_text()))


def _answered(world: Atlas, judge: Judge, question: Question, place: str, rng: random.Random, margin: float) -> Example:
    split = place.partition(":")[0]
    prompt = ({"role": "user", "content": question.text},)
    one = rng.choice(sorted(POLICIES))
    names = {"rl": [], "sft": [one], "base": [one]}.get(split, sorted(POLICIES))
    responses = [_scored(judge, prompt, world.answer(question, POLICIES[name], rng), name) for name in names]
    return _with_preferences(prompt, responses, f"atlas:{place}", margin)


def _with_remarks(judge: Judge, question: str, answer: str) -> str:
    """A question and its answer as a conversation, with a reader's remarks: one on every statement, one on the end."""
    words = answer.split()
    for statement in reversed(judge.judge(question, answer).statements):
        words[statement.end : statement.end] = REMARKS[statement.verdict].split()
    return f"{_conversation(question, ' '.join(words))} {_last_remark(judge, question, answer)}"


def _with_last_remark(judge: Judge, question: str, answer: str) -> str:
    """The same with a remark on the end only: on what the answer leaves out."""
    return f"{_conversation(question, answer)} {_last_remark(judge, question, answer)}"


def _conversation(question: str, answer: str) -> str:
    return f"{USER} {question} {EOS} {ASSISTANT} {answer}"


def _last_remark(judge: Judge, question: str, answer: str) -> str:
    return closing_remark(judge.judge(question, answer).missing)


def _curriculum(lessons: list[str], conversations: list[str], seed: int) -> list[str]:
    """Lessons first and conversations last, with a long stretch of both: what a lesson taught is not lost again."""
    rng = random.Random(seed)
    placed = [(rng.uniform(0, LESSONS_END), text) for text in lessons]
    placed += [(rng.uniform(CONVERSATIONS_BEGIN, 1), text) for text in conversations]
    return [text for _, text in sorted(placed)]


def _scored(judge: Judge, prompt: tuple[Message, ...], text: str, policy: str) -> Response:
    return Response(text, policy, judge.judge(prompt[-1]["content"], text).score)


def _with_preferences(prompt: tuple[Message, ...], responses: list[Response], origin: str, margin: float) -> Example:
    """Every pair of responses whose gold scores differ by `margin` or more; the others are ties to an annotator."""
    scores = [r.score or 0.0 for r in responses]
    order = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] - scores[j] >= margin]
    return Example(prompt, tuple(responses), tuple(order), origin)
