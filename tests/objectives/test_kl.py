"""The KL reward stream, the KL loss term and the adaptive coefficient."""

import math

import pytest
import torch

from dvpo.objectives.kl import AdaptiveKL, kl_loss, kl_rewards

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs, reference = (-torch.rand(2, 3, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return logprobs.requires_grad_(True), reference


def test_rewards_are_minus_beta_times_the_log_ratio() -> None:
    logprobs, reference = draws()
    found = kl_rewards(logprobs, reference, MASK, 0.05)
    assert not found.requires_grad
    logprobs = logprobs.detach()
    for i, t in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        assert float(found[i, t]) == pytest.approx(-0.05 * (float(logprobs[i, t]) - float(reference[i, t])), abs=1e-12)
    assert float(found[0, 2]) == 0


def test_loss_is_the_k3_estimate_and_its_gradient_that_of_the_formula() -> None:
    logprobs, reference = draws()
    found = kl_loss(logprobs, reference, MASK, 5)
    expected = 0.0
    for i, t in MASK.nonzero().tolist():
        d = float(reference[i, t] - logprobs[i, t].detach())
        expected += (math.exp(d) - d - 1) / 5
    assert found.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logprobs)
    # d/dlogp of exp(ref - logp) - (ref - logp) - 1 is 1 - exp(ref - logp).
    by_hand = torch.where(MASK, (1 - torch.exp(reference - logprobs)) / 5, 0)
    assert torch.allclose(gradient, by_hand, atol=1e-12, rtol=0)


def test_loss_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    logprobs, reference = draws()
    assert float(kl_loss(reference, reference, MASK, 5)) == 0
    assert kl_loss(logprobs, reference, MASK, 5).item() > 0


def test_padding_moves_neither_value_nor_gradient() -> None:
    """Whatever stands in the padding, even a difference whose exponential overflows."""
    logprobs, reference = draws()
    base = kl_loss(logprobs, reference, MASK, 5)
    (base_gradient,) = torch.autograd.grad(base, logprobs)
    for fill in (10.0, -1e6):
        padded = torch.where(MASK, logprobs.detach(), fill).requires_grad_(True)
        loss = kl_loss(padded, reference, MASK, 5)
        (gradient,) = torch.autograd.grad(loss, padded)
        assert torch.equal(loss, base)
        assert torch.equal(gradient, base_gradient)
        assert torch.equal(kl_rewards(padded, reference, MASK, 0.1), kl_rewards(logprobs, reference, MASK, 0.1))


def test_adaptive_coefficient_by_hand() -> None:
    controller = AdaptiveKL(beta=0.05, target=0.1, horizon=100)
    controller.update(0.11, 10)  # error 0.1
    assert controller.beta == pytest.approx(0.05 * 1.01, rel=1e-12)
    controller.update(5.0, 10)  # clipped to 0.2
    assert controller.beta == pytest.approx(0.05 * 1.01 * 1.02, rel=1e-12)
    controller.update(0.0, 10)  # clipped to -0.2
    assert controller.beta == pytest.approx(0.05 * 1.01 * 1.02 * 0.98, rel=1e-12)
    at_target = controller.beta
    controller.update(0.1, 10)
    assert controller.beta == pytest.approx(at_target, rel=1e-12)


def test_no_target_keeps_the_coefficient() -> None:
    controller = AdaptiveKL(beta=0.05, target=None, horizon=100)
    controller.update(9.0, 1000)
    assert controller.beta == 0.05
