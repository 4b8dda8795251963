"""Splits grouped preference data (many named policies a prompt) by prompt and by policy, for the tau option.

    python examples/policies_apart.py DATA OUT

DATA is what `--data` takes. Writes OUT/train.jsonl (three quarters of the prompts and of the policies),
OUT/unseen_prompts.jsonl (the other prompts, the same policies) and OUT/unseen_policies.jsonl (the other prompts and the
other policies). Scores become ranks within a prompt, from -1 to 1: the raw scores of some judges have most of their
mass at one end. Answers whose ranks differ by less than half are ties.
"""

import argparse
import random
from pathlib import Path

from dvpo.data.formats import prompt_key, read
from dvpo.data.records import Example, Response, dump_examples
from dvpo.errors import InputError

MARGIN = 0.5


def split(data: str, out: str, seed: int = 0) -> None:
    """See the module. Raises InputError for data that cannot be read, or with fewer than four named policies."""
    examples = list(read(data).examples)
    names = sorted({r.policy for e in examples for r in e.responses if r.policy is not None})
    if len(names) < 4:
        raise InputError(f"{data}: {len(names)} named policies; give grouped data with a model for every response")
    rng = random.Random(seed)
    rng.shuffle(names)
    rng.shuffle(examples)
    seen = set(names[: len(names) * 3 // 4])
    prompts = list(dict.fromkeys(prompt_key(e.prompt) for e in examples))  # one may stand in many rows
    trained = set(prompts[: len(prompts) * 3 // 4])
    train = [e for e in examples if prompt_key(e.prompt) in trained]
    unseen = [e for e in examples if prompt_key(e.prompt) not in trained]
    parts = {
        "train": [_ranked(e, seen) for e in train],
        "unseen_prompts": [_ranked(e, seen) for e in unseen],
        "unseen_policies": [_ranked(e, set(names) - seen) for e in unseen],
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        dump_examples(rows, Path(out) / f"{name}.jsonl")
        print(f"{name}: {len(rows)} prompts, {sum(len(r.preferences) for r in rows)} pairs")
    print("unseen policies:", ", ".join(sorted(set(names) - seen)))


def _ranked(example: Example, policies: set[str]) -> Example:
    """The answers of some policies, scored by their rank among these, ties by their mean rank."""
    chosen = [r for r in example.responses if r.policy in policies and r.score is not None]
    raw = [r.score or 0.0 for r in chosen]
    ranks = [sum(s < own for s in raw) + (raw.count(own) - 1) / 2 for own in raw]
    most = max(len(raw) - 1, 1)
    responses = tuple(Response(r.text, r.policy, 2 * k / most - 1) for r, k in zip(chosen, ranks, strict=True))
    scores = [r.score or 0.0 for r in responses]
    order = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] - scores[j] >= MARGIN]
    return Example(example.prompt, responses, tuple(order), example.origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Split grouped preference data by prompt and by policy.")
    parser.add_argument("data")
    parser.add_argument("out")
    given = parser.parse_args()
    try:
        split(given.data, given.out)
    except InputError as error:
        parser.error(str(error))
