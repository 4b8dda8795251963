"""The online methods beside one another, and our GRPO beside TRL's GRPOTrainer, on the same prompts.

A turn is one update: the same prompts are answered, the frozen models judge the answers, and every mini-batch
is one optimiser step. Phases, in seconds per update: `generate`; of the judging `reference` (its log-probabilities),
`old` (the policy's own), `value` (DVPO's value model, or the reward model), `critic` (PPO's) and `other`, what is left;
of the learning `forward` (policy and critic), `optimiser` and `backward`, what is left.
"""

import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.config import PolicySettings
from dvpo.data.records import Message
from dvpo.errors import InputError
from reproduce.bench.common import (
    Job,
    Row,
    Turns,
    column,
    finish,
    in_turns,
    load_libraries,
    peak,
    ratio,
    spread,
)

PROMPTS = 4
STEPS = 2
"""Optimiser steps in one pass over the responses."""
EPOCHS = 2
GROUP = 5
MAX_PROMPT_TOKENS = 128
MAX_NEW_TOKENS = 48
METHODS: dict[str, dict[str, Any]] = {
    "dvpo": {"name": "dvpo", "estimator": "gae"},
    "ppo": {"name": "ppo", "critic_learning_rate": 1e-6},
    "remax": {"name": "remax"},
    "grpo": {"name": "grpo", "group_size": GROUP},
}
_BETA = 0.05


@dataclass(frozen=True)
class Work:
    """What is optimised, against what, on what."""

    start: Path
    gvm: Path
    reward: Path
    prompts: list[tuple[Message, ...]]
    bf16: bool
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def micro_responses(self) -> int:
        """Responses in one forward and backward pass at most: the mini-batch of a group method."""
        return len(self.prompts) // STEPS * GROUP

    def settings(self, method: str) -> PolicySettings:
        """The settings of one of ours; its distance to the reference is a loss term, as TRL's is."""
        return PolicySettings(
            algorithm=METHODS[method],
            learning_rate=1e-6,
            updates=1_000_000,
            prompts_per_update=len(self.prompts),
            minibatch_size=len(self.prompts) // STEPS,
            micro_batch_size=self.micro_responses,
            epochs=EPOCHS,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_new_tokens=self.max_new_tokens,
            kl={"beta": _BETA, "target": None, "form": "loss"},
            bf16=self.bf16,
        )


def measure(
    start: Path, gvm: Path, reward: Path, prompts: str, against: str | None, bf16: bool, rounds: int,
    count: int = PROMPTS, max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """Seconds per update and peak memory; see `document`. `against` is None for our four methods, or `trl`: then our
    GRPO and TRL's are measured, alone.

    Raises:
        InputError: no usable model or prompts, or a count of prompts that the steps cannot share.
        StageError: a measured process died.
    """
    if count % STEPS:
        raise InputError(f"--prompts-per-update {count}: an update has {STEPS} steps; name a multiple of {STEPS}")
    work = Work(start, gvm, reward, read_prompts(start, prompts, count), bf16, max_new_tokens)
    if against is None:
        jobs = {name: Job(update_ours, (work, name)) for name in METHODS}
    else:
        jobs = {"grpo": Job(update_ours, (work, "grpo")), against: Job(update_trl, (work,))}
    return document(work, in_turns(jobs, rounds))


def read_prompts(start: Path, source: str, count: int = PROMPTS) -> list[tuple[Message, ...]]:
    """The first `count` prompts within the length limit: every update of every method answers these."""
    from dvpo.data.formats import read
    from dvpo.data.templates import encode_prompt
    from dvpo.models import load_tokenizer

    tokenizer = load_tokenizer(start)
    found: list[tuple[Message, ...]] = []
    for example in read(source).examples:
        if len(encode_prompt(tokenizer, example.prompt)) <= MAX_PROMPT_TOKENS:
            found.append(example.prompt)
        if len(found) == count:
            return found
    raise InputError(f"{source}: only {len(found)} prompts of at most {MAX_PROMPT_TOKENS} tokens; {count} are needed")


def document(work: Work, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Medians and ranges over the updates; the ratios are those of the rounds."""
    found: dict[str, Any] = {
        "models": {"start": work.start.name, "gvm": work.gvm.name, "reward": work.reward.name},
        "precision": "bf16 autocast" if work.bf16 else "float32",
        "prompts_per_update": len(work.prompts),
        "optimiser_steps_per_update": EPOCHS * STEPS,
        "epochs": EPOCHS,
        "group_size": GROUP,
        "max_new_tokens": work.max_new_tokens,
        "rounds": len(next(iter(rows.values()))),
        "methods": {name: _summary(turns) for name, turns in rows.items()},
        "ratios": {},
    }
    mine = "dvpo" if "dvpo" in rows else "grpo"
    for other in [name for name in rows if name != mine]:
        found["ratios"][f"{mine} / {other}"] = {
            "seconds": ratio(column(rows[mine], "seconds"), column(rows[other], "seconds")),
            "memory": peak(rows[mine]) / peak(rows[other]),
        }
    return found


def update_ours(turns: Turns, work: Work, method: str) -> None:
    """The process of one of our methods."""
    from dvpo.training.policy import Frozen, OnlineTrainer

    load_libraries(work.start)
    turns.begin()
    trainer = OnlineTrainer(work.start, Frozen(work.gvm, work.reward), work.prompts, work.settings(method), 0)
    watch = Stopwatch()
    before = dict(trainer.seconds)
    while True:
        row = trainer.step()
        spent = {phase: seconds - before[phase] for phase, seconds in trainer.seconds.items()}
        before = dict(trainer.seconds)
        turns.end(length=row["length"], **watch.phases(spent))


class Stopwatch:
    """Adds up the seconds in every model of this process and in the optimisers' steps, whoever calls them.

    What runs with a key-value cache is generation, and is not counted here.
    """

    def __init__(self) -> None:
        from torch.optim import optimizer

        self._seconds: dict[str, float] = defaultdict(float)
        self._depth = 0
        self._began = 0.0
        for model in _loaded_models():
            self._watch(model)
        optimizer.register_optimizer_step_pre_hook(lambda *_: self._start())
        optimizer.register_optimizer_step_post_hook(lambda *_: self._stop("optimiser"))

    def phases(self, spent: dict[str, float]) -> dict[str, float]:
        """The phases of what was spent on `generate`, `judge` and `learn` since the last call."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        judged = {name: seconds[name] for name in ("reference", "value", "critic")} | {"old": seconds["policy"]}
        forward = seconds["policy, learning"] + seconds["critic, learning"]
        return {
            "generate": spent["generate"],
            **judged,
            "other": spent["judge"] - sum(judged.values()),
            "forward": forward,
            "optimiser": seconds["optimiser"],
            "backward": spent["learn"] - forward - seconds["optimiser"],
        }

    def _watch(self, model: Any) -> None:
        learns = any(p.requires_grad for p in model.parameters())
        if type(model).__name__.endswith("ForCausalLM"):
            name = "policy" if learns else "reference"
        else:
            name = "critic" if learns else "value"
        # Its backbone or its output layer may be called alone.
        for part in filter(None, (model, model.base_model, model.get_output_embeddings())):
            part.register_forward_pre_hook(lambda *_: self._start())
            part.register_forward_hook(
                lambda module, given, named, output: self._stop(None if named.get("use_cache") else name),
                with_kwargs=True,
            )

    def _start(self) -> None:
        if self._depth == 0:
            finish()
            self._began = time.perf_counter()
        self._depth += 1

    def _stop(self, name: str | None) -> None:
        import torch

        self._depth -= 1
        if self._depth == 0 and name is not None:
            finish()
            learning = torch.is_grad_enabled() and name != "optimiser"
            self._seconds[f"{name}, learning" if learning else name] += time.perf_counter() - self._began


def _loaded_models() -> list[Any]:
    """The whole models in this process's memory, whatever the trainer calls them."""
    from transformers import PreTrainedModel

    return [x for x in gc.get_objects() if isinstance(x, PreTrainedModel) and x.base_model is not x]


def update_trl(turns: Turns, work: Work) -> None:
    """The process of TRL's GRPOTrainer, answering by transformers' own `generate`."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from dvpo import models

    load_libraries(work.start)
    turns.begin()
    seconds: dict[str, float] = defaultdict(float)
    lengths: list[int] = []

    class Timed(GRPOTrainer):
        """Measures what TRL does where it answers, and where it answers and scores."""

        def _generate(self, *given: Any) -> Any:
            began = time.perf_counter()
            generated = super()._generate(*given)
            seconds["generate"] += time.perf_counter() - began
            lengths.extend(map(len, generated[1]))
            return generated

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            seconds["roll_out"] += time.perf_counter() - began
            return batch

    class Updates(TrainerCallback):
        """A turn is as many optimiser steps as one of our updates."""

        def on_train_begin(self, *_: Any, **others: Any) -> None:
            turns.start_clock()

        def on_step_end(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            if state.global_step % (EPOCHS * STEPS) == 0:
                generate, judge = seconds["generate"], seconds["roll_out"] - seconds["generate"]
                length = sum(lengths) / len(lengths)
                seconds.clear()
                lengths.clear()
                turns.end(length=length, generate=generate, judge=judge)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            models.load(work.start, "policy"),
            models.load(work.reward, "reward"),
            args=_grpo_config(GRPOConfig, work, folder),
            train_dataset=datasets.Dataset.from_list([{"prompt": list(p)} for p in work.prompts]),
            processing_class=models.load_tokenizer(work.start),
            reward_processing_classes=models.load_tokenizer(work.reward),
            callbacks=[Updates()],
        )
        trainer.train()


def _grpo_config(make: Any, work: Work, folder: str) -> Any:
    """What our settings say, in TRL's words. The learning of an update sees every response `EPOCHS` times."""
    import torch

    responses = len(work.prompts) * GROUP
    return make(
        output_dir=folder,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        per_device_train_batch_size=work.micro_responses,
        generation_batch_size=responses,
        num_generations=GROUP,
        num_iterations=EPOCHS,
        max_steps=1_000_000,
        max_completion_length=work.max_new_tokens,
        beta=_BETA,
        bf16=work.bf16,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1_000_000,
        report_to=[],
        disable_tqdm=True,
    )


def _summary(turns: Sequence[Row]) -> dict[str, Any]:
    others = {"seconds", "memory_mb", "length"}
    return {
        "seconds": spread(column(turns, "seconds")),
        "phases": {name: spread(column(turns, name))["median"] for name in turns[0] if name not in others},
        "response_tokens": spread(column(turns, "length")),
        "memory_mb": peak(turns),
    }
