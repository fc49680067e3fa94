"""The clipped surrogate has PPO's values and gradients, and its metrics are what they say."""

from __future__ import annotations

import math

import pytest
import torch

from sfgrpo.grpo.losses import clipped_surrogate
from tests.support import oracles


def test_loss_equals_ppo_by_its_cases() -> None:
    log_prob, old_log_prob, advantage = torch.randn(3, 40).unbind()
    result = clipped_surrogate(log_prob, old_log_prob, advantage, 0.2)
    expected = oracles.clipped_surrogate(log_prob.tolist(), old_log_prob.tolist(), advantage.tolist(), 0.2)
    torch.testing.assert_close(result.loss, torch.tensor(expected))


def test_ratio_one_gives_minus_the_advantage_and_the_policy_gradient() -> None:
    log_prob = torch.randn(5, 4, requires_grad=True)
    advantage = torch.randn(5, 4)
    result = clipped_surrogate(log_prob, log_prob.detach(), advantage, 1e-4)
    result.loss.sum().backward()
    torch.testing.assert_close(result.loss, -advantage)
    torch.testing.assert_close(log_prob.grad, -advantage)


@pytest.mark.parametrize(("shift", "advantage"), [(0.5, 1.0), (-0.5, -1.0)])
def test_ratio_that_went_far_enough_has_no_gradient(shift: float, advantage: float) -> None:
    log_prob = torch.full((3,), shift, requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(3), torch.full((3,), advantage), 0.2).loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.zeros(3), rtol=0, atol=0)


@pytest.mark.parametrize(("shift", "advantage"), [(0.5, -1.0), (-0.5, 1.0)])
def test_ratio_that_went_the_wrong_way_keeps_its_gradient(shift: float, advantage: float) -> None:
    log_prob = torch.full((3,), shift, requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(3), torch.full((3,), advantage), 0.2).loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.full((3,), -advantage * math.exp(shift)))


def test_log_ratio_is_clamped_before_exp() -> None:
    log_prob = torch.tensor([1000.0, -1000.0], requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.2)
    result.loss.sum().backward()
    torch.testing.assert_close(result.loss, torch.tensor([math.exp(20), 0.8]))
    assert bool(log_prob.grad.isfinite().all())


def test_metrics_have_hand_values() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.1, 2.0])
    result = clipped_surrogate(ratio.log(), torch.zeros(4), torch.ones(4), 0.2)
    torch.testing.assert_close(result.ratio, ratio)
    torch.testing.assert_close(result.deviation, torch.tensor([0.5, 0.0, 0.1, 1.0]))
    torch.testing.assert_close(result.clipped, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    expected_kl = [-0.5 - math.log(0.5), 0.0, 0.1 - math.log(1.1), 1 - math.log(2)]
    torch.testing.assert_close(result.approx_kl, torch.tensor(expected_kl))


def test_only_the_loss_carries_a_gradient() -> None:
    log_prob = torch.randn(4, requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(4), torch.ones(4), 0.2)
    metrics = (result.ratio, result.deviation, result.clipped, result.approx_kl)
    assert result.loss.requires_grad and not any(metric.requires_grad for metric in metrics)


def test_unchanged_policy_has_no_deviation_at_all() -> None:
    log_prob = torch.randn(50)
    result = clipped_surrogate(log_prob, log_prob.clone(), torch.randn(50), 1e-4)
    assert not result.deviation.any() and not result.clipped.any() and not result.approx_kl.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_prob_that_is_not_a_number_shows_in_everything_of_its_element_alone(value: float) -> None:
    log_prob = torch.zeros(3, requires_grad=True)
    result = clipped_surrogate(log_prob, torch.tensor([0.0, value, 0.0]), torch.ones(3), 0.2)
    for numbers in (result.loss, result.ratio, result.deviation, result.clipped, result.approx_kl):
        assert numbers.isnan().tolist() == [False, True, False]
    result.loss[[0, 2]].sum().backward()
    assert log_prob.grad.tolist() == [-1.0, 0.0, -1.0]


def test_nothing_gives_nothing() -> None:
    log_prob = torch.zeros(0, requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(0), torch.zeros(0), 0.2)
    assert result.loss.sum() == 0 and result.ratio.shape == (0,)
