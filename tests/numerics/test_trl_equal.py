"""Losses and gradients of a whole model, three ways: ours, TRL's own code, and a plain loop over texts and tokens.

The plain loop runs every text alone, without padding, in float64. TRL's trainers get the same weights in float64. Ours
computes log-probabilities and values in float32 at the last layer by design, and is held to that.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from trl import DPOConfig, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from dvpo import models
from dvpo.data.pairs import EncodedPair, Encoder, preference_picks
from dvpo.data.templates import Encoded
from dvpo.logprobs import response_logprobs
from dvpo.objectives.advantages import Signals, grpo
from dvpo.objectives.kl import kl_loss
from dvpo.objectives.policy_loss import policy_loss
from dvpo.objectives.td import td_lambda_targets, value_model_loss
from dvpo.training.dpo import TokenDPOTrainer
from dvpo.values import collate, sequence_scores, token_values

CLIP, KL = 0.2, 0.07
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def pairs(tokenizer, examples) -> list[EncodedPair]:
    return list(Encoder(tokenizer, examples, 200, 200).pairs(preference_picks(examples, None, 0)))[:4]


@pytest.fixture(scope="module")
def six(texts) -> list[Encoded]:
    """Ragged prompts and responses."""
    assert len({len(t.prompt_ids) for t in texts[:6]}) > 2 and len({len(t.response_ids) for t in texts[:6]}) > 2
    return texts[:6]


def moved(folder: Path, role: models.Role) -> Any:
    """A model a little away from its checkpoint, in float64: ratios are not 1, and both models differ."""
    model = models.load(folder, role, fresh_head=role != "policy").double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def gradients(model: Any, loss: Tensor) -> Tensor:
    """All of them, one after another. A weight that the loss does not see has gradient 0."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten().double()
            for p, g in zip(model.parameters(), found, strict=True)
        ]
    )


def close(found: Tensor, expected: Tensor, allowed: float) -> None:
    """The error's length against the gradient's."""
    assert float(expected.norm()) > 1e-2
    assert float((found - expected).norm() / expected.norm()) <= allowed


def logprobs_alone(model: Any, text: Encoded) -> Tensor:
    """log pi(y_t | s_t), t = 1..T, from the text's own forward pass, float64. [T]."""
    ids = torch.tensor([text.prompt_ids + text.response_ids])
    logprobs_L_V = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    assert logprobs_L_V.dtype == torch.float64
    first = len(text.prompt_ids)
    return torch.stack([logprobs_L_V[first + t - 1, token] for t, token in enumerate(text.response_ids)])


def values_alone(model: Any, text: Encoded) -> Tensor:
    """The head at the last prompt token and at every response token, float64. [T + 1]."""
    ids = torch.tensor([text.prompt_ids + text.response_ids])
    hidden_L_D = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(text.prompt_ids) - 1 :]
    head = models.head(model)
    return hidden_L_D @ head.weight[0] + (0 if head.bias is None else head.bias[0])


def padded(rows: list[Tensor], like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Stage:
    """Rollouts of six responses in two groups: the policy has moved since, and the reference is another model."""

    def __init__(self, start: Path, texts: list[Encoded]):
        self.texts = texts
        self.model = moved(start, "policy")
        reference = models.load(start, "policy").double()
        g = torch.Generator().manual_seed(0)
        self.batch = collate(texts, pad_id=0)
        self.mask_B_T = self.batch.mask_B_S[:, 1:]
        with torch.no_grad():
            self.reference = [logprobs_alone(reference, t) for t in texts]
            now = [logprobs_alone(self.model, t) for t in texts]
        self.old = [x + 0.3 * torch.randn(len(x), generator=g, dtype=torch.float64) for x in now]
        self.scores_B = torch.randn(len(texts), generator=g, dtype=torch.float64)

    def advantages(self) -> list[float]:
        """By hand: standardised within each group of three."""
        found = []
        for start in (0, 3):
            group = [float(s) for s in self.scores_B[start : start + 3]]
            mean = sum(group) / 3
            std = math.sqrt(sum((s - mean) ** 2 for s in group) / 2)
            found += [(s - mean) / (std + 1e-4) for s in group]
        return found

    def plain(self) -> Tensor:
        """Eq. 2 with the k3 term, token by token."""
        total: Any = 0.0
        for text, old_T, ref_T, advantage in zip(self.texts, self.old, self.reference, self.advantages(), strict=True):
            new_T = logprobs_alone(self.model, text)
            for new, old, ref in zip(new_T, old_T, ref_T, strict=True):
                ratio = torch.exp(new - old)
                total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                total = total + KL * (torch.exp(ref - new) - (ref - new) - 1)
        return total / sum(len(t.response_ids) for t in self.texts)


@pytest.fixture(scope="module")
def stage(checkpoints, six) -> Stage:
    return Stage(checkpoints["llama", "policy"], six)


def test_grpo_is_trls_and_a_plain_loops(stage, tokenizer, tmp_path) -> None:
    config = GRPOConfig(
        output_dir=str(tmp_path),
        beta=KL,
        epsilon=CLIP,
        per_device_train_batch_size=6,
        num_generations=3,
        use_bias_correction_kl=False,  # the plain k3 estimate
        **ARGUMENTS,
    )
    trainer = GRPOTrainer(
        model=stage.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * 6),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    prompts = [torch.tensor(t.prompt_ids) for t in stage.texts]
    longest = max(map(len, prompts))
    responses = padded([torch.tensor(t.response_ids) for t in stage.texts], stage.mask_B_T)
    theirs = trainer._compute_loss(
        stage.model,
        {
            # TRL pads prompts on the left.
            "prompt_ids": torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts]),
            "prompt_mask": torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long(),
            "completion_ids": responses,
            "completion_mask": stage.mask_B_T.long(),
            "advantages": torch.tensor(stage.advantages(), dtype=torch.float64),
            "old_per_token_logps": padded(stage.old, stage.mask_B_T),
            "ref_per_token_logps": padded(stage.reference, stage.mask_B_T),
            "num_items_in_batch": stage.mask_B_T.sum(),
        },
    )
    their_gradients = gradients(stage.model, theirs)

    old, ref = padded(stage.old, stage.mask_B_T), padded(stage.reference, stage.mask_B_T)
    advantages_B_T = grpo(Signals(stage.mask_B_T, scores_B=stage.scores_B, group_size=3))
    count = stage.mask_B_T.sum()
    logprobs = response_logprobs(stage.model, stage.batch, 1.0)
    ours, clipped = policy_loss(logprobs, old, advantages_B_T, stage.mask_B_T, CLIP, count)
    assert clipped > 0.05
    ours = ours + KL * kl_loss(logprobs, ref, stage.mask_B_T, count)
    our_gradients = gradients(stage.model, ours)

    plain = stage.plain()
    expected = gradients(stage.model, plain)
    assert ours.item() == pytest.approx(plain.item(), abs=2e-6)
    assert theirs.item() == pytest.approx(plain.item(), abs=2e-6)
    close(our_gradients, expected, 1e-5)
    close(their_gradients, expected, 1e-5)


def test_the_policy_loss_itself_is_exact_in_float64(stage) -> None:
    """From the same log-probabilities, to the last digits: nothing in it goes through float32."""
    rows = [logprobs_alone(stage.model, t).detach() for t in stage.texts]
    logprobs = padded(rows, stage.mask_B_T).requires_grad_(True)
    old, ref = padded(stage.old, stage.mask_B_T), padded(stage.reference, stage.mask_B_T)
    advantages_B_T = grpo(Signals(stage.mask_B_T, scores_B=stage.scores_B, group_size=3))
    count = stage.mask_B_T.sum()
    loss = policy_loss(logprobs, old, advantages_B_T, stage.mask_B_T, CLIP, count)[0]
    loss = loss + KL * kl_loss(logprobs, ref, stage.mask_B_T, count)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(stage.plain().item(), rel=1e-12)
    for i, t in stage.mask_B_T.nonzero().tolist():
        new, before, start, a = (float(x) for x in (rows[i][t], old[i, t], ref[i, t], advantages_B_T[i, t]))
        ratio = math.exp(new - before)
        free = ratio * a <= min(max(ratio, 1 - CLIP), 1 + CLIP) * a
        slope = (-ratio * a if free else 0.0) + KL * (1 - math.exp(start - new))
        assert float(gradient[i, t]) == pytest.approx(slope / int(count), rel=1e-10, abs=1e-14)
    assert not gradient[~stage.mask_B_T].any()


def test_dpo_is_a_plain_loops(checkpoints, pairs, tokenizer, tmp_path) -> None:
    start, beta = checkpoints["llama", "policy"], 0.3
    model, reference = moved(start, "policy"), models.load(start, "policy").double()
    rows = [
        {"prompt_ids": p.better.prompt_ids, "chosen_ids": p.better.response_ids, "rejected_ids": p.worse.response_ids}
        for p in pairs
    ]
    trainer = TokenDPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), beta=beta, max_length=None, **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.compute_loss(model, trainer.data_collator(rows))
    total: Any = 0.0
    for pair in pairs:
        margins = [
            logprobs_alone(model, text).sum() - logprobs_alone(reference, text).sum().detach()
            for text in (pair.better, pair.worse)
        ]
        total = total + torch.log1p(torch.exp(-beta * (margins[0] - margins[1])))
    plain = total / len(pairs)
    assert abs(plain.item() - math.log(2)) > 0.01
    assert theirs.item() == pytest.approx(plain.item(), rel=1e-5)
    close(gradients(model, theirs), gradients(model, plain), 1e-5)


def test_the_reward_loss_is_a_plain_loops_over_the_scores_we_read(checkpoints, pairs, tokenizer, tmp_path) -> None:
    model = moved(checkpoints["llama", "reward"], "reward")
    rows = [
        {
            "chosen_ids": p.better.prompt_ids + p.better.response_ids,
            "rejected_ids": p.worse.prompt_ids + p.worse.response_ids,
        }
        for p in pairs
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), max_length=None, **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.compute_loss(model, trainer.data_collator(rows))
    better, worse = (
        sequence_scores(model, collate([getattr(p, side) for p in pairs], 0)) for side in ("better", "worse")
    )
    ours = torch.log1p(torch.exp(-(better - worse))).mean()
    scores = [[values_alone(model, text)[-1] for text in (p.better, p.worse)] for p in pairs]
    plain = sum(torch.log1p(torch.exp(-(b - w))) for b, w in scores) / len(pairs)
    expected = gradients(model, plain)
    for found in (theirs, ours):
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)
        close(gradients(model, found), expected, 1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_value_loss_is_a_plain_loops(checkpoints, six, lam: float, gamma: float) -> None:
    model = moved(checkpoints["llama", "value"], "value")
    rewards = [1.0, -1.0, 0.3, -2.0, 1.5, 0.0]
    batch = collate(six, 0)
    values_B_S = token_values(model, batch)
    targets_B_S = td_lambda_targets(values_B_S, torch.tensor(rewards), batch.mask_B_S, gamma, lam)
    ours = value_model_loss(values_B_S, targets_B_S, batch.mask_B_S, batch.mask_B_S.sum())

    total: Any = 0.0
    states = 0
    for text, reward in zip(six, rewards, strict=True):
        h = values_alone(model, text)
        target = reward
        for t in reversed(range(len(h))):
            if t + 1 < len(h):
                target = gamma * ((1 - lam) * h[t + 1].item() + lam * target)
            total = total + (h[t] - target) ** 2
            states += 1
    plain = total / states
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    close(gradients(model, ours), gradients(model, plain), 1e-5)


def test_the_value_targets_are_exact_in_float64(ragged: Callable[..., Any]) -> None:
    """Against the sum over all n-step returns, the textbook's definition of TD(lambda)."""
    rows = [[0.3, -0.2, 0.9, 0.4], [1.5], [-0.7, 0.2]]
    rewards, lam, gamma = [1.0, -1.0, 0.25], 0.9, 0.97
    values_B_S, mask_B_S = ragged(rows, fill=99.0)
    found = td_lambda_targets(values_B_S, torch.tensor(rewards, dtype=torch.float64), mask_B_S, gamma, lam)
    for i, h in enumerate(rows):
        for t in range(len(h)):
            left = len(h) - 1 - t  # steps until the reward
            returns = [gamma**n * h[t + n] for n in range(1, left + 1)] + [gamma**left * rewards[i]]
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left + 1)]
            weights.append(lam**left)
            expected = sum(w * g for w, g in zip(weights, returns, strict=True))
            assert float(found[i, t]) == pytest.approx(expected, rel=1e-12)
