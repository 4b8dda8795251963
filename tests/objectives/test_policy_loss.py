"""The clipped losses against plain loops and against TRL's own GRPO loss on one batch."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dvpo.objectives.kl import kl_loss
from dvpo.objectives.policy_loss import critic_loss, policy_loss, token_logprobs, truncated_importance_weights

MASK = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
COUNT = int(MASK.sum())


def draws(seed: int = 0) -> dict[str, torch.Tensor]:
    """Logits, sampled ids, old and reference log-probabilities and advantages of four ragged responses."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, 11, generator=g, dtype=torch.float32)
    ids = torch.randint(0, 11, (4, 6), generator=g)
    now = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)
    return {
        "logits": logits,
        "ids": ids,
        "now": now,
        "old": now + 0.4 * torch.randn(4, 6, generator=g),
        "reference": now + 0.3 * torch.randn(4, 6, generator=g),
        "advantages": torch.randn(4, 6, generator=g),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_token_logprobs_equal_log_softmax_at_the_temperature(temperature: float) -> None:
    d = draws()
    logits = d["logits"] * 10
    expected = torch.log_softmax(logits.double() / temperature, -1).gather(-1, d["ids"][..., None]).squeeze(-1)
    assert torch.allclose(token_logprobs(logits, d["ids"], temperature).double(), expected, atol=2e-5, rtol=0)
    half = token_logprobs(logits.bfloat16(), d["ids"], temperature)
    assert half.dtype == torch.float32


def test_policy_loss_equals_a_plain_loop() -> None:
    d = draws()
    loss, share = policy_loss(d["now"], d["old"], d["advantages"], MASK, 0.2, COUNT)
    total, clipped = 0.0, 0
    for i, t in MASK.nonzero().tolist():
        ratio = math.exp(float(d["now"][i, t]) - float(d["old"][i, t]))
        a = float(d["advantages"][i, t])
        bounded = min(max(ratio, 0.8), 1.2)
        total -= min(ratio * a, bounded * a)
        clipped += bounded * a < ratio * a
    assert float(loss) == pytest.approx(total / COUNT, abs=1e-6)
    assert clipped > 0
    assert float(share) == pytest.approx(clipped / COUNT, abs=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, 0.0), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, 0.0), (1.1, 2.0, 2.2)],
)
def test_clipping_cuts_the_gradient_on_the_greedy_side_only(ratio: float, advantage: float, expected: float) -> None:
    """The derivative of -loss by log pi is ratio * A where not clipped, else 0."""
    now = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = policy_loss(now, torch.zeros(1, 1), advantage * one, one.bool(), 0.2, 1)
    loss.backward()
    assert float(-now.grad) == pytest.approx(expected, abs=1e-6)


def test_padding_never_matters() -> None:
    d = draws()
    losses, gradients = [], []
    for fill in (0.0, 1e4, -1e4):
        now = torch.where(MASK, d["now"], fill).requires_grad_(True)
        old, advantages = (torch.where(MASK, d[k], -3 * fill) for k in ("old", "advantages"))
        loss, share = policy_loss(now, old, advantages, MASK, 0.2, COUNT)
        loss.backward()
        losses.append((loss.item(), share.item()))
        gradients.append(now.grad)
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_any_split_into_micro_batches_gives_the_same_gradient(split: list[int]) -> None:
    """With the count of the whole batch, not that of each part."""
    d = draws()
    whole = d["now"].clone().requires_grad_(True)
    policy_loss(whole, d["old"], d["advantages"], MASK, 0.2, COUNT)[0].backward()
    parts = d["now"].clone().requires_grad_(True)
    start = 0
    for size in split:
        rows = slice(start, start + size)
        policy_loss(parts[rows], d["old"][rows], d["advantages"][rows], MASK[rows], 0.2, COUNT)[0].backward()
        start += size
    assert torch.allclose(parts.grad, whole.grad, atol=1e-8, rtol=0)


def test_critic_loss_equals_a_plain_loop() -> None:
    d = draws()
    values, old, returns = d["now"], d["old"], d["advantages"]
    total = 0.0
    for i, t in MASK.nonzero().tolist():
        v, o, r = (float(x[i, t]) for x in (values, old, returns))
        bounded = o + min(max(v - o, -0.2), 0.2)
        total += 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
    assert float(critic_loss(values, old, returns, MASK, 0.2, COUNT)) == pytest.approx(total / COUNT, rel=1e-5)
    padded = torch.where(MASK, values, 1e6).requires_grad_(True)
    loss = critic_loss(padded, old, returns, MASK, 0.2, COUNT)
    loss.backward()
    assert loss.item() == pytest.approx(total / COUNT, rel=1e-5)
    assert not padded.grad[~MASK].any()


def trl_loss(d: dict[str, torch.Tensor], logits: torch.Tensor, loss_type: str, beta: float) -> torch.Tensor:
    """TRL's GRPOTrainer._compute_loss, called on a stand-in that has what it reads instead of a trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import selective_log_softmax

    def logps(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor, None]:
        return selective_log_softmax(logits, d["ids"]), torch.zeros_like(d["now"]), None

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type=loss_type,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": d["ids"],
        "completion_mask": MASK.long(),
        "advantages": d["advantages"],
        "old_per_token_logps": d["old"],
        "ref_per_token_logps": d["reference"],
        "num_items_in_batch": MASK.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_equal_trl_on_the_same_batch(loss_type: str, beta: float) -> None:
    """The losses of TRL that are a mean over tokens, with and without the KL term."""
    d = draws()
    theirs_logits, ours_logits = (d["logits"].clone().requires_grad_(True) for _ in range(2))
    theirs = trl_loss(d, theirs_logits, loss_type, beta)
    logprobs = token_logprobs(ours_logits, d["ids"])
    ours = policy_loss(logprobs, d["old"], d["advantages"], MASK, 0.2, COUNT)[0]
    ours = ours + beta * kl_loss(logprobs, d["reference"], MASK, COUNT)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    theirs.backward()
    ours.backward()
    assert float(ours_logits.grad.abs().max()) > 1e-3
    assert torch.allclose(ours_logits.grad, theirs_logits.grad, atol=1e-6, rtol=0)


def test_truncated_importance_weights_by_hand() -> None:
    old = torch.tensor([[0.5, 0.2, 0.9]]).log().requires_grad_()
    engine = torch.tensor([[0.4, 0.4, 0.3]]).log()
    weights = truncated_importance_weights(old, engine, cap=2.0)
    assert weights[0].tolist() == pytest.approx([1.25, 0.5, 2.0])
    assert not weights.requires_grad


def test_importance_weights_undo_the_engine_s_distribution() -> None:
    """The mean over the engine's tokens, weighted, is the mean under the trainer's distribution."""
    g = torch.Generator().manual_seed(0)
    trainer, engine = torch.randn(2, 7, generator=g, dtype=torch.float64).log_softmax(-1)
    gain = torch.randn(7, generator=g, dtype=torch.float64)
    weights = truncated_importance_weights(trainer, engine, cap=1e9)
    assert float((engine.exp() * weights * gain).sum()) == pytest.approx(float((trainer.exp() * gain).sum()))


@pytest.mark.parametrize("v", [1.0, -1.0])
def test_the_critic_is_clipped_on_both_sides(v: float) -> None:
    one = torch.ones(1, 1)
    assert float(critic_loss(v * one, 0 * one, v * one, one.bool(), 0.2, 1)) == pytest.approx(0.5 * 0.8**2)
