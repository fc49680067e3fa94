"""Gains are differences of neighbouring rewards, in generation order."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.grpo.gains import decayed_gains, step_gains


def test_gain_is_the_later_reward_minus_the_earlier() -> None:
    rewards = torch.tensor([[0.0, 0.5, 0.25, 1.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(step_gains(rewards), torch.tensor([[0.5, -0.25, 0.75], [0.0, -1.0, 0.0]]))


def test_gains_sum_to_the_last_reward_minus_the_first() -> None:
    rewards = torch.rand(24, 11)
    torch.testing.assert_close(step_gains(rewards).sum(1), rewards[:, -1] - rewards[:, 0])


def test_constant_reward_gains_nothing() -> None:
    torch.testing.assert_close(step_gains(torch.full((3, 11), 0.3)), torch.zeros(3, 10), rtol=0, atol=0)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 1.0])
def test_decayed_gains_are_the_sums_that_they_are_named_for(gae_lambda: float) -> None:
    gains = torch.randn(5, 4)
    expected = [[sum(gae_lambda**j * float(row[k + j]) for j in range(4 - k)) for k in range(4)] for row in gains]
    torch.testing.assert_close(decayed_gains(gains, gae_lambda), torch.tensor(expected))


def test_gains_are_left_alone_by_decay() -> None:
    gains = torch.randn(5, 4)
    before = gains.clone()
    decayed_gains(gains, 0.5)
    assert torch.equal(gains, before)
