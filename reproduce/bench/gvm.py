"""Training a value model beside training a reward model with TRL's RewardTrainer, on the same texts.

Both go through the functions that `dvpo train gvm` and `dvpo train rm` call (the second is TRL's trainer, unchanged).
Batches have the same number of texts, micro-batches are of the same size, precision and optimiser are the same; each
takes the texts in its own order. A turn is some optimiser steps. Training tokens are those of prompts and responses.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.data.pairs import EncodedPair
from dvpo.errors import InputError
from reproduce.bench.common import Job, Row, Turns, column, in_turns, load_libraries, peak, ratio, spread

PAIRS = 64
BATCH_PAIRS = 4
STEPS = 4
"""Optimiser steps in a turn: the warm-up and three turns go through all pairs once."""
MAX_PROMPT_TOKENS = 256
MAX_RESPONSE_TOKENS = 384


@dataclass(frozen=True)
class Work:
    """What is trained on."""

    start: Path
    pairs: list[EncodedPair]
    bf16: bool
    batch_pairs: int = BATCH_PAIRS
    micro_pairs: int = BATCH_PAIRS // 2
    steps: int = STEPS


def measure(
    start: Path, data: str, against: str | None, bf16: bool, rounds: int, batch_pairs: int = BATCH_PAIRS
) -> dict[str, Any]:
    """Tokens per second and peak memory; see `document`.

    Raises:
        InputError: no usable model or data, or a batch that cannot be halved.
        StageError: a measured process died.
    """
    if batch_pairs % 2:
        raise InputError(f"--batch-pairs {batch_pairs}: a batch is two micro-batches; name an even number")
    pairs = read_pairs(start, data, max(PAIRS, STEPS * batch_pairs))
    work = Work(start, pairs, bf16, batch_pairs, batch_pairs // 2)
    jobs = {"ours": Job(train_ours, (work,))}
    if against is not None:
        jobs[against] = Job(train_trl, (work,))
    return document(work, in_turns(jobs, rounds))


def read_pairs(start: Path, data: str, most: int) -> list[EncodedPair]:
    """The first `most` preference pairs within the length limits; longer responses are cut."""
    from dvpo.data.formats import read
    from dvpo.data.pairs import Encoder, preference_picks
    from dvpo.models import load_tokenizer

    examples = read(data).examples
    encoder = Encoder(load_tokenizer(start), examples, MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS)
    pairs = []
    for pair in encoder.pairs(preference_picks(examples, 1, 0)):
        pairs.append(pair)
        if len(pairs) == most:
            return pairs
    raise InputError(
        f"{data}: only {len(pairs)} pairs have a prompt of at most {MAX_PROMPT_TOKENS} tokens; {most} are needed"
    )


def document(work: Work, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Medians and ranges over the turns, of both and of the rounds' ratios.

    `computed_per_token` is how many tokens go through the model, padding included, for one training token.
    """
    lengths = sorted(len(t.prompt_ids) + len(t.response_ids) for p in work.pairs for t in (p.better, p.worse))
    found: dict[str, Any] = {
        "model": work.start.name,
        "precision": "bf16 autocast" if work.bf16 else "float32",
        "pairs": len(work.pairs),
        "batch_texts": 2 * work.batch_pairs,
        "micro_batch_texts": 2 * work.micro_pairs,
        "steps_per_round": work.steps,
        "text_tokens": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "rounds": len(rows["ours"]),
        "trainers": {name: _summary(work, turns) for name, turns in rows.items()},
    }
    for other in [name for name in rows if name != "ours"]:
        for what in ("tokens", "texts"):
            speeds = [_speeds(work, rows[name], what) for name in ("ours", other)]
            found[f"{what}_per_second_ratio"] = ratio(*speeds)
        found["memory_ratio"] = peak(rows["ours"]) / peak(rows[other])
    return found


def train_ours(turns: Turns, work: Work) -> None:
    """The GVM trainer's process."""
    from dvpo.config import GvmSettings
    from dvpo.training.gvm import ValueText, train_gvm

    texts = [ValueText(t, r) for p in work.pairs for t, r in ((p.better, 1.0), (p.worse, -1.0))]
    settings = GvmSettings(
        **{**_settings(work), "batch_size": 2 * work.batch_pairs, "micro_batch_size": 2 * work.micro_pairs}
    )
    _train(turns, work, lambda out, state: train_gvm(work.start, texts, settings, out, state, 0))


def train_trl(turns: Turns, work: Work) -> None:
    """The process of TRL's RewardTrainer."""
    from dvpo.config import RewardSettings
    from dvpo.training.reward import train_reward

    settings = RewardSettings(
        **{**_settings(work), "batch_size": work.batch_pairs, "micro_batch_size": work.micro_pairs}
    )
    _train(turns, work, lambda out, state: train_reward(work.start, work.pairs, settings, out, state, 0))


def _settings(work: Work) -> dict[str, Any]:
    return {
        "learning_rate": 1e-5,
        "schedule": "constant",
        "epochs": 100,  # the process is ended before
        "save_steps": 1_000_000,  # never
        "log_steps": 1_000_000,
        "bf16": work.bf16,
    }


def _train(turns: Turns, work: Work, train: Any) -> None:
    """Trains, with every `steps` optimiser steps as a turn."""
    from transformers import TrainerCallback, trainer

    from dvpo.models import load_tokenizer

    class Steps(TrainerCallback):
        """Also counts what goes through the model."""

        def __init__(self) -> None:
            self.tokens = self.computed = 0
            self.pad_id: Any = load_tokenizer(work.start).pad_token_id  # not always the model's own

        def on_train_begin(self, *_: Any, model: Any, **others: Any) -> None:
            model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
            turns.start_clock()

        def on_step_end(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            if state.global_step % work.steps == 0:
                counted = {"tokens": self.tokens, "computed": self.computed}
                self.tokens = self.computed = 0
                turns.end(**counted)

        def _count(self, module: Any, inputs: Any, named: dict[str, Any]) -> None:
            ids = named["input_ids"] if "input_ids" in named else inputs[0]
            self.computed += ids.numel()
            mask = named.get("attention_mask")
            # Our trainer gives a causal model no mask; its padding token stands nowhere else.
            self.tokens += int((ids != self.pad_id if mask is None else mask).sum())

    # What both trainers build on takes its callbacks from here; neither function has a way in for them.
    trainer.DEFAULT_CALLBACKS.append(Steps)
    load_libraries(work.start)
    turns.begin()
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "out", Path(folder) / "state")


def _speeds(work: Work, turns: Sequence[Row], what: str) -> list[float]:
    """Tokens or texts per second, turn by turn."""
    texts = 2.0 * work.batch_pairs * work.steps
    return [(row["tokens"] if what == "tokens" else texts) / row["seconds"] for row in turns]


def _summary(work: Work, turns: Sequence[Row]) -> dict[str, Any]:
    return {
        "seconds": spread(column(turns, "seconds")),
        "tokens_per_second": spread(_speeds(work, turns, "tokens")),
        "texts_per_second": spread(_speeds(work, turns, "texts")),
        "computed_per_token": spread([row["computed"] / row["tokens"] for row in turns]),
        "memory_mb": peak(turns),
    }
