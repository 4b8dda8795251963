"""The online loop: one for DVPO, PPO, ReMax and GRPO.

An algorithm is a rollout plan (`_roll_out`), what the frozen models say of the rollouts (`_judge`), and an advantage
estimator. Rollouts, optimiser, KL and clipping are shared. The frozen models run once per rollout, not once per epoch.
PPO alone has a second network, the critic.

With several processes each answers, judges and learns from its equal share of every batch. What is found of a rollout
is put together on all of them before it is used, so statistics are those of the whole batch, and the number of
processes changes nothing but rounding.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dvpo import distributed, models, stopping
from dvpo.batching import buckets, places
from dvpo.config import PolicySettings
from dvpo.data.records import Message
from dvpo.data.templates import Encoded, encode_prompt
from dvpo.errors import InputError
from dvpo.logprobs import response_logprobs
from dvpo.memory import give_back
from dvpo.objectives.advantages import ESTIMATORS, Signals, discounted_sum
from dvpo.objectives.kl import AdaptiveKL, kl_loss, kl_rewards
from dvpo.objectives.policy_loss import critic_loss, policy_loss
from dvpo.objectives.stats import masked_mean, masked_whiten
from dvpo.rollout import prompt_seed
from dvpo.training.engines import importance_weights, make_engine
from dvpo.training.frozen import Frozen, RemoteValues, frozen_model
from dvpo.training.learner import Learner, learner
from dvpo.training.mixed import learning_autocast
from dvpo.training.policy_state import load_state, save_state
from dvpo.values import ValueBatch, collate, sequence_scores, token_values

Prompt = tuple[Message, ...]
Monitor = Callable[[Sequence[Prompt], Sequence[str]], dict[str, float]]
"""Looks at prompts and responses and returns numbers to log; it never touches the training."""


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
        self.processes = distributed.start()
        self.processes.require_divides("prompts_per_update", settings.prompts_per_update * self._group)
        self.processes.require_divides("minibatch_size", settings.minibatch_size * self._group)
        self.device = self.processes.device
        torch.manual_seed(seed)
        self.tokenizer = models.load_tokenizer(start)
        policy = models.load(start, "policy", lora=settings.lora).to(self.device)

        def frozen_one(folder: Path | None, role: models.Role, name: str) -> Any:
            return frozen_model(folder, role, name, start, settings, self.processes)

        # With LoRA the reference is the same weights with the adapter off.
        self.reference = None if settings.lora else frozen_one(start, "policy", "reference")
        self.value = self.reward = self.critic = None
        if self.algorithm.name == "dvpo":
            url = self.algorithm.value_url
            self.value = RemoteValues(url, self.tokenizer) if url else frozen_one(frozen.value, "value", "value")
        else:
            self.reward = frozen_one(frozen.reward, "reward", "reward")
        self.policy_learner = self._learner(policy, settings.learning_rate)
        self.policy = self.policy_learner.module
        self.critic_learner: Learner | None = None
        if self.algorithm.name == "ppo":
            assert frozen.reward is not None  # frozen_model has refused None
            critic = models.critic_from_reward(frozen.reward, settings.lora).to(self.device)
            self.critic_learner = self._learner(critic, self.algorithm.critic_learning_rate)
            self.critic = self.critic_learner.module
        self.reward_scale = frozen.reward_scale
        self.kl = AdaptiveKL(settings.kl.beta, settings.kl.target, settings.kl.horizon)
        self.engine = make_engine(settings, self.policy, self.tokenizer, start)
        self.prompts = self._encode(prompts)
        longest = max(len(ids) for _, ids in self.prompts) + settings.max_new_tokens
        for model in filter(None, (self.policy, self.value, self.reward)):
            if not isinstance(model, RemoteValues):
                models.require_reads(model, longest, "max_prompt_tokens or max_new_tokens")
        self.update = 0
        self.log: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {"generate": 0.0, "judge": 0.0, "learn": 0.0}

    def train(self, state: Path) -> list[dict[str, float]]:
        """Runs the remaining updates, with a checkpoint in `state` every `save_updates`. Returns a row per update."""
        load_state(self, state)
        while self.update < self.settings.updates:
            self.step()
            stop = any(self.processes.gather([stopping.asked()]))
            if (stop or self.update % self.settings.save_updates == 0) and self.update < self.settings.updates:
                save_state(self, state)
                if stop:
                    raise stopping.Stopped(f"stopped as asked after update {self.update} of {self.settings.updates}")
        return self.log

    def step(self) -> dict[str, float]:
        """One update: answer a batch of prompts, judge the answers, learn from them."""
        chosen = self._prompts_of(self.update)
        seed = random.Random(f"{self.seed} {self.update}").getrandbits(31)
        with self._timed("generate"):
            texts, greedy, drawn = self._roll_out(chosen)
        with self._timed("judge"):
            rollouts, row = self._judge(chosen, texts, greedy)
            cap = getattr(self.settings.engine, "importance_cap", None)
            if cap is not None:
                weights = importance_weights(rollouts.old_logprobs, drawn, rollouts.mask, cap)
                rollouts.advantages = rollouts.advantages * weights
                row["importance"] = float(masked_mean(weights, rollouts.mask))
        with self._timed("learn"):
            if self.settings.bf16 and self.device.type == "cpu":  # float32 on a CPU is for models too small to gain
                give_back()  # answering and judging leave holes that gradients do not fit into
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
        self.policy_learner.save(self.tokenizer, out)
        if self.critic_learner is not None:
            self.critic_learner.save(self.tokenizer, out / "critic")

    def _roll_out(self, chosen: Sequence[int]) -> tuple[list[Encoded], list[Encoded], list[list[float]]]:
        """The sampled responses (a prompt's are neighbours), ReMax's greedy ones, and the engine's log-probabilities of
        what it sampled.
        """
        prompts = [self.prompts[i][1] for i in chosen for _ in range(self._group)]
        mine = self.processes.share(prompts)
        seeds = self.processes.share([prompt_seed(self.seed, self.update, place) for place in range(len(prompts))])
        self.policy_learner.model.eval()
        own = self.settings.engine.name == "transformers"  # the others gather one weight at a time
        with self.policy_learner.gathered() if own else nullcontext(), self.engine.awake():
            samples = self.engine.sample(mine, seeds)
            greedy = self.engine.greedy(mine) if self.algorithm.name == "remax" else []
        samples, greedy = self.processes.gather(samples), self.processes.gather(greedy)
        texts = _zip(prompts, [sample.token_ids for sample in samples])
        return texts, _zip(prompts, greedy), [sample.logprobs for sample in samples]

    @torch.no_grad()
    def _judge(
        self, chosen: Sequence[int], texts: list[Encoded], greedy: list[Encoded]
    ) -> tuple[Rollouts, dict[str, float]]:
        """One pass of every frozen model, then the advantages."""
        s = self.settings
        mask = collate(texts, self.tokenizer.pad_token_id).mask_B_S[:, 1:].to(self.device)
        policy = self.policy_learner.model
        old = self._chunks(texts, lambda b: response_logprobs(policy, b, s.temperature))
        with self._reference() as reference:
            ref = self._chunks(texts, lambda b: response_logprobs(reference, b, s.temperature))
        signals = Signals(mask, group_size=self._group, gamma=s.gamma, lam=s.lam)
        row: dict[str, float] = {}
        if self.value is not None:
            values = self._frozen_values(self._value_texts(chosen, texts))
            signals = replace(signals, values_B_S=values)
            row["value"] = float(masked_mean(values[:, 1:], mask))
        else:
            scores_B = self._scores(texts)
            signals = replace(signals, scores_B=scores_B)
            row["score"] = float(scores_B.mean())
        if greedy:
            signals = replace(signals, greedy_scores_B=self._scores(greedy))
        if self.critic_learner is not None:
            critic = self.critic_learner.model
            signals = replace(signals, values_B_S=self._chunks(texts, lambda b: token_values(critic, b)))
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
        self.policy_learner.model.train()
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
                parts = _split(self.processes.share(rows), self.settings.micro_batch_size or size)
                for number, part in enumerate(parts, 1):
                    for name, value in self._backward(r, part, count, last=number == len(parts)).items():
                        sums[name] += value
                self.policy_learner.step()
                if self.critic_learner is not None:
                    self.critic_learner.step()
                steps += 1
        if self.critic is None:
            del sums["critic_loss"]
        return {name: value / steps for name, value in self.processes.sum(sums).items()}

    def _backward(self, r: Rollouts, rows: list[int], count: Tensor, last: bool) -> dict[str, float]:
        s = self.settings
        batch = collate([r.texts[i] for i in rows], self.tokenizer.pad_token_id).to(self.device)
        width = batch.mask_B_S.shape[1] - 1
        mask, old, ref, advantages = (x[rows, :width] for x in (r.mask, r.old_logprobs, r.ref_logprobs, r.advantages))
        with self._learning_autocast():
            logprobs = response_logprobs(self.policy_learner.model, batch, s.temperature)
        loss, clipped = policy_loss(logprobs, old, advantages, mask, s.clip, count)
        if s.kl.form == "loss":
            loss = loss + self.kl.beta * kl_loss(logprobs, ref, mask, count)
        self.policy_learner.backward(loss, last)
        sums = {"policy_loss": float(loss.detach()), "clipped": float(clipped)}
        if self.critic_learner is not None and r.old_values is not None and r.returns is not None:
            with self._learning_autocast():
                values = token_values(self.critic_learner.model, batch)[:, :-1]
            value_loss = critic_loss(
                values, r.old_values[rows, :width], r.returns[rows, :width], mask, self.algorithm.value_clip, count
            )
            self.critic_learner.backward(self.algorithm.value_coefficient * value_loss, last)
            sums["critic_loss"] = float(value_loss.detach())
        return sums

    def _scores(self, texts: list[Encoded]) -> Tensor:
        """The reward model's standardised scores. [B]."""
        mean, std = self.reward_scale
        return (self._chunks(texts, lambda b: sequence_scores(self.reward, b)[:, None])[:, 0] - mean) / std

    def _frozen_values(self, texts: list[Encoded]) -> Tensor:
        """h_0..h_T by the frozen value model, in this process or behind a server. [B, S]."""
        if isinstance(self.value, RemoteValues):
            return self.processes.gather_rows(self.value(self.processes.share(texts)).to(self.device))
        return self._chunks(texts, lambda b: token_values(self.value, b))

    def _value_texts(self, chosen: Sequence[int], texts: list[Encoded]) -> list[Encoded]:
        """What the value model reads: the rollouts, each after tau, k answers of this batch to other prompts."""
        k = self.algorithm.trajectory_k
        if not k:
            return texts
        pairs = [(self.prompts[i][0], self._text(t)) for i, t in zip(chosen, texts, strict=True)]
        rotated = [pairs[i + 1 :] + pairs[:i] for i in range(len(pairs))]
        taus = [[pair for pair in r if pair[0] != own][:k] for (own, _), r in zip(pairs, rotated, strict=True)]
        return [
            Encoded(encode_prompt(self.tokenizer, prompt, tau), text.response_ids)
            for (prompt, _), tau, text in zip(pairs, taus, texts, strict=True)
        ]

    def _chunks(self, texts: list[Encoded], run: Callable[[ValueBatch], Tensor]) -> Tensor:
        """`run` on micro-batches of texts of like length, its [b, T'] outputs padded with 0 to one [B, T] tensor.

        Every process runs its share and gets the whole.
        """
        mine = self.processes.share(texts)
        lengths = [len(t.prompt_ids) + len(t.response_ids) for t in mine]
        batches = buckets(lengths, self.settings.micro_batch_size or len(mine))
        outputs = []
        for rows in batches:
            batch = collate([mine[i] for i in rows], self.tokenizer.pad_token_id)
            with self._autocast():
                outputs.append(run(batch.to(self.device)).float())
        width = max(o.shape[1] for o in outputs)
        joined = torch.cat([torch.nn.functional.pad(o, (0, width - o.shape[1])) for o in outputs])
        return self.processes.gather_rows(joined[places(batches)])

    def _prompts_of(self, update: int) -> list[int]:
        """The prompts of an update: whole passes over the data, each in its own seeded order."""
        first, n = update * self.settings.prompts_per_update, len(self.prompts)
        places = range(first, first + self.settings.prompts_per_update)
        orders: dict[int, list[int]] = {}
        for number in {i // n for i in places}:
            orders[number] = list(range(n))
            random.Random(f"{self.seed} {number}").shuffle(orders[number])
        return [orders[i // n][i % n] for i in places]

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

    def _learner(self, model: Any, learning_rate: float) -> Learner:
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return learner(model, learning_rate, self.settings.max_grad_norm, self.processes, self.settings.bf16)

    @contextmanager
    def _reference(self) -> Any:
        with nullcontext() if self.reference is not None else self.policy.disable_adapter():
            yield self.reference if self.reference is not None else self.policy_learner.model

    @contextmanager
    def _timed(self, phase: str) -> Any:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _learning_autocast(self) -> AbstractContextManager[None]:
        if self.policy_learner.in_place:
            return learning_autocast(self.device.type, self.settings.bf16)
        return self._autocast()

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
    return [Encoded(p, r) for p, r in zip(prompts, responses, strict=True)] if responses else []


def _split(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
