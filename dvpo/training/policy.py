"""The online loop: one for DVPO, PPO, ReMax and GRPO.

An algorithm is a rollout plan (`_roll_out`), what the frozen models say of the rollouts (`_judge`), and an advantage
estimator. Rollouts, optimiser, KL and clipping are shared. The frozen models run once per rollout, not once per epoch.
PPO alone has a second network, the critic.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dvpo import models
from dvpo.config import PolicySettings
from dvpo.data.records import Message
from dvpo.data.templates import Encoded, encode_prompt
from dvpo.errors import InputError
from dvpo.logprobs import response_logprobs
from dvpo.objectives.advantages import ESTIMATORS, Signals, discounted_sum
from dvpo.objectives.kl import AdaptiveKL, kl_loss, kl_rewards
from dvpo.objectives.policy_loss import critic_loss, policy_loss
from dvpo.objectives.stats import masked_mean, masked_whiten
from dvpo.rollout.transformers import TransformersEngine
from dvpo.training.policy_state import load_state, save_state
from dvpo.values import ValueBatch, collate, sequence_scores, token_values

Prompt = tuple[Message, ...]
Monitor = Callable[[Sequence[Prompt], Sequence[str]], dict[str, float]]
"""Looks at prompts and responses and returns numbers to log; it never touches the training."""


@dataclass(frozen=True)
class Frozen:
    """The frozen models' folders: `value` for DVPO, `reward` for the others.

    reward_scale: (mean, std) by which the reward model's raw scores are standardised.
    """

    value: Path | None = None
    reward: Path | None = None
    reward_scale: tuple[float, float] = (0.0, 1.0)


@dataclass
class Rollouts:
    """B responses with all that stays fixed while they are used. Tensors are [B, T] over response tokens."""

    texts: list[Encoded]
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None


class OnlineTrainer:
    """Optimises a policy against frozen models.

    Raises InputError where a frozen model is missing for the algorithm, or has another tokenizer than the policy.
    """

    def __init__(
        self, start: Path, frozen: Frozen, prompts: Sequence[Prompt], settings: PolicySettings, seed: int,
        monitor: Monitor | None = None,
    ):  # fmt: skip
        self.settings, self.seed, self.monitor = settings, seed, monitor
        self.algorithm = cast(Any, settings.algorithm)  # its fields depend on its name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        self.tokenizer = models.load_tokenizer(start)
        self.policy = models.load(start, "policy", lora=settings.lora).to(self.device)
        # With LoRA the reference is the same weights with the adapter off.
        self.reference = None if settings.lora else self._frozen_model(start, "policy", "reference", start)
        self.value = self.reward = self.critic = None
        if self.algorithm.name == "dvpo":
            self.value = self._frozen_model(frozen.value, "value", "value", start)
        else:
            self.reward = self._frozen_model(frozen.reward, "reward", "reward", start)
        if self.algorithm.name == "ppo":
            assert frozen.reward is not None  # _frozen_model has refused None
            self.critic = models.critic_from_reward(frozen.reward, settings.lora).to(self.device)
        self.reward_scale = frozen.reward_scale
        self.kl = AdaptiveKL(settings.kl.beta, settings.kl.target, settings.kl.horizon)
        self.optimizer: torch.optim.Optimizer = self._adamw(self.policy, settings.learning_rate)
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if self.critic is not None:
            self.critic_optimizer = self._adamw(self.critic, self.algorithm.critic_learning_rate)
        self.engine = TransformersEngine(self.policy, self.tokenizer, settings.max_new_tokens, settings.temperature)
        self.prompts = self._encode(prompts)
        self.update = 0
        self.log: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {"generate": 0.0, "judge": 0.0, "learn": 0.0}

    def train(self, state: Path) -> list[dict[str, float]]:
        """Runs the remaining updates, with a checkpoint in `state` every `save_updates`. Returns a row per update."""
        load_state(self, state)
        while self.update < self.settings.updates:
            self.step()
            if self.update % self.settings.save_updates == 0 and self.update < self.settings.updates:
                save_state(self, state)
        return self.log

    def step(self) -> dict[str, float]:
        """One update: answer a batch of prompts, judge the answers, learn from them."""
        chosen = self._prompts_of(self.update)
        seed = random.Random(f"{self.seed} {self.update}").getrandbits(31)
        with self._timed("generate"):
            texts, greedy = self._roll_out(chosen, seed)
        with self._timed("judge"):
            rollouts, row = self._judge(chosen, texts, greedy)
        with self._timed("learn"):
            row |= self._learn(rollouts, seed)
        self.kl.update(row["kl"], len(texts))
        self.update += 1
        row = {"update": self.update, **row, "beta": self.kl.beta}
        if self.monitor:
            shown = [self.prompts[i][0] for i in chosen for _ in range(self._group)]
            row |= self.monitor(shown, [self._text(t) for t in texts])
        self.log.append(row)
        return row

    def save(self, out: Path) -> None:
        """Saves the policy in `out`, and PPO's critic in `out/critic`."""
        models.save(self.policy, self.tokenizer, out)
        if self.critic is not None:
            models.save(self.critic, self.tokenizer, out / "critic")

    def _roll_out(self, chosen: Sequence[int], seed: int) -> tuple[list[Encoded], list[Encoded]]:
        """The sampled responses (a prompt's are neighbours), and ReMax's greedy ones."""
        prompts = [self.prompts[i][1] for i in chosen]
        repeated = [p for p in prompts for _ in range(self._group)]
        self.policy.eval()
        responses = self.engine.generate(repeated, seed=seed)
        greedy = self.engine.generate(prompts, seed=seed, greedy=True) if self.algorithm.name == "remax" else []
        return _zip(repeated, responses), _zip(prompts, greedy) if greedy else []

    @torch.no_grad()
    def _judge(
        self, chosen: Sequence[int], texts: list[Encoded], greedy: list[Encoded]
    ) -> tuple[Rollouts, dict[str, float]]:
        """One pass of every frozen model, then the advantages."""
        s = self.settings
        mask = collate(texts, self.tokenizer.pad_token_id).mask_B_S[:, 1:].to(self.device)
        old = self._chunks(texts, lambda b: response_logprobs(self.policy, b, s.temperature))
        with self._reference() as reference:
            ref = self._chunks(texts, lambda b: response_logprobs(reference, b, s.temperature))
        signals = Signals(mask, group_size=self._group, gamma=s.gamma, lam=s.lam)
        row: dict[str, float] = {}
        if self.value is not None:
            values = self._chunks(self._value_texts(chosen, texts), lambda b: token_values(self.value, b))
            signals = replace(signals, values_B_S=values)
            row["value"] = float(masked_mean(values[:, 1:], mask))
        else:
            scores_B = self._scores(texts)
            signals = replace(signals, scores_B=scores_B)
            row["score"] = float(scores_B.mean())
        if greedy:
            signals = replace(signals, greedy_scores_B=self._scores(greedy))
        if self.critic is not None:
            signals = replace(signals, values_B_S=self._chunks(texts, lambda b: token_values(self.critic, b)))
        advantages = ESTIMATORS[self._estimator](signals)
        if s.kl.form == "reward":
            penalty = kl_rewards(old, ref, mask, self.kl.beta)
            advantages = advantages + discounted_sum(penalty, mask, s.gamma * s.lam)
        rollouts = Rollouts(texts, mask, old, ref, advantages)
        if self.critic is not None:
            assert signals.values_B_S is not None
            rollouts.old_values = signals.values_B_S[:, :-1]
            rollouts.returns = advantages + rollouts.old_values
        if s.whiten:
            rollouts.advantages = masked_whiten(advantages, mask)
        ends = [t.response_ids[-1] == self.tokenizer.eos_token_id for t in texts]
        row |= {
            "kl": float(masked_mean(old - ref, mask)),
            "length": float(mask.sum(1).float().mean()),
            "finished": sum(ends) / len(ends),
            "surprise": -float(masked_mean(old, mask)),
        }
        return rollouts, row

    def _learn(self, r: Rollouts, seed: int) -> dict[str, float]:
        """Epochs of mini-batches; each mini-batch is one optimiser step, whatever its micro-batches."""
        self.policy.train()
        size = self.settings.minibatch_size * self._group
        shuffler = random.Random(seed)
        sums = {"policy_loss": 0.0, "clipped": 0.0, "critic_loss": 0.0}
        steps = 0
        for _ in range(self.settings.epochs):
            order = list(range(len(r.texts)))
            shuffler.shuffle(order)
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                count = r.mask[rows].sum()
                for part in _split(rows, self.settings.micro_batch_size or size):
                    for name, value in self._backward(r, part, count).items():
                        sums[name] += value
                self._optimise(self.policy, self.optimizer)
                if self.critic is not None:
                    self._optimise(self.critic, self.critic_optimizer)
                steps += 1
        if self.critic is None:
            del sums["critic_loss"]
        return {name: value / steps for name, value in sums.items()}

    def _backward(self, r: Rollouts, rows: list[int], count: Tensor) -> dict[str, float]:
        s = self.settings
        batch = collate([r.texts[i] for i in rows], self.tokenizer.pad_token_id).to(self.device)
        width = batch.mask_B_S.shape[1] - 1
        mask, old, ref, advantages = (x[rows, :width] for x in (r.mask, r.old_logprobs, r.ref_logprobs, r.advantages))
        with self._autocast():
            logprobs = response_logprobs(self.policy, batch, s.temperature)
        loss, clipped = policy_loss(logprobs, old, advantages, mask, s.clip, count)
        if s.kl.form == "loss":
            loss = loss + self.kl.beta * kl_loss(logprobs, ref, mask, count)
        loss.backward()
        sums = {"policy_loss": float(loss.detach()), "clipped": float(clipped)}
        if self.critic is not None and r.old_values is not None and r.returns is not None:
            with self._autocast():
                values = token_values(self.critic, batch)[:, :-1]
            value_loss = critic_loss(
                values, r.old_values[rows, :width], r.returns[rows, :width], mask, self.algorithm.value_clip, count
            )
            (self.algorithm.value_coefficient * value_loss).backward()
            sums["critic_loss"] = float(value_loss.detach())
        return sums

    def _optimise(self, model: Any, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), self.settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _scores(self, texts: list[Encoded]) -> Tensor:
        """The reward model's standardised scores. [B]."""
        mean, std = self.reward_scale
        return (self._chunks(texts, lambda b: sequence_scores(self.reward, b)[:, None])[:, 0] - mean) / std

    def _value_texts(self, chosen: Sequence[int], texts: list[Encoded]) -> list[Encoded]:
        """What the value model reads: the rollouts, each after tau, k other answers of this batch."""
        k = self.algorithm.trajectory_k
        if not k:
            return texts
        pairs = [(self.prompts[i][0], self._text(t)) for i, t in zip(chosen, texts, strict=True)]
        taus = [[pairs[(i + 1 + j) % len(pairs)] for j in range(min(k, len(pairs) - 1))] for i in range(len(pairs))]
        return [
            Encoded(encode_prompt(self.tokenizer, prompt, tau), text.response_ids)
            for (prompt, _), tau, text in zip(pairs, taus, texts, strict=True)
        ]

    def _chunks(self, texts: list[Encoded], run: Callable[[ValueBatch], Tensor]) -> Tensor:
        """`run` on micro-batches of texts, its [b, T'] outputs padded with 0 to one [B, T] tensor."""
        size = self.settings.micro_batch_size or len(texts)
        outputs = []
        for part in _split(texts, size):
            with self._autocast():
                outputs.append(run(collate(part, self.tokenizer.pad_token_id).to(self.device)).float())
        width = max(o.shape[1] for o in outputs)
        return torch.cat([torch.nn.functional.pad(o, (0, width - o.shape[1])) for o in outputs])

    def _prompts_of(self, update: int) -> list[int]:
        """The prompts of an update: whole passes over the data, each in its own seeded order."""
        first = update * self.settings.prompts_per_update
        chosen, n = [], len(self.prompts)
        for i in range(first, first + self.settings.prompts_per_update):
            order = list(range(n))
            random.Random(f"{self.seed} {i // n}").shuffle(order)
            chosen.append(order[i % n])
        return chosen

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
        encoded = [(p, encode_prompt(self.tokenizer, p)) for p in prompts]
        kept = [(p, ids) for p, ids in encoded if len(ids) <= self.settings.max_prompt_tokens]
        if not kept:
            raise InputError(
                f"no prompt is within max_prompt_tokens={self.settings.max_prompt_tokens}; raise the limit"
            )
        self.said = [
            f"{len(encoded) - len(kept)} of {len(encoded)} prompts are over the length limit and were left out"
        ]
        return kept

    def _frozen_model(self, folder: Path | None, role: Any, name: str, start: Path) -> Any:
        if folder is None:
            raise InputError(f"{self.algorithm.name} needs a {name} model; name its folder")
        models.require_same_tokenizer(start, folder, name)
        return models.load(folder, role).to(self.device).eval().requires_grad_(False)

    def _adamw(self, model: Any, learning_rate: float) -> torch.optim.AdamW:
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, weight_decay=0.0)

    @contextmanager
    def _reference(self) -> Any:
        with nullcontext() if self.reference is not None else self.policy.disable_adapter():
            yield self.reference if self.reference is not None else self.policy

    @contextmanager
    def _timed(self, phase: str) -> Any:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _text(self, text: Encoded) -> str:
        return self.tokenizer.decode(text.response_ids, skip_special_tokens=True)

    @property
    def _group(self) -> int:
        return self.algorithm.group_size if self.algorithm.name == "grpo" else 1

    @property
    def _estimator(self) -> str:
        if self.algorithm.name == "dvpo":
            return self.algorithm.estimator
        return "critic" if self.algorithm.name == "ppo" else self.algorithm.name


def _zip(prompts: list[list[int]], responses: list[list[int]]) -> list[Encoded]:
    return [Encoded(p, r) for p, r in zip(prompts, responses, strict=True)]


def _split(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
