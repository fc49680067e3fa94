"""Advantages keep every invariant of the method, and equal a loop over samples and steps."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from sfgrpo.grpo.advantages import Advantages, group_advantages
from tests.support import oracles

GROUP_SIZE, NUM_STEPS, NUM_PROMPTS = 6, 4, 3
CREDITS = ("joint", "per_step", "step_mean", "terminal")
CASES = list(itertools.product(CREDITS, ("group", "global")))

normalise = functools.partial(group_advantages, group_size=GROUP_SIZE, states=range(NUM_STEPS + 1), clip=1e6)


def random_rewards() -> Tensor:
    """Draws rewards whose first column is one number per group, as that of a shared start state is."""
    rewards = torch.rand(NUM_PROMPTS, GROUP_SIZE, NUM_STEPS + 1)
    first = rewards[:, :1, :1].expand(-1, GROUP_SIZE, 1)
    return torch.cat([first, rewards[:, :, 1:]], dim=2).flatten(0, 1)


def groups(advantages: Advantages) -> Tensor:
    return advantages.values_NK.unflatten(0, (-1, GROUP_SIZE))


@pytest.mark.parametrize("clip", [0.8, 5.0])
@pytest.mark.parametrize(("credit", "std"), CASES)
def test_advantages_equal_a_naive_loop(credit: str, std: str, clip: float) -> None:
    rewards = random_rewards()
    result = normalise(rewards, credit=credit, std=std, clip=clip, eps=1e-4)
    expected = oracles.advantages(rewards.tolist(), GROUP_SIZE, NUM_STEPS, credit, std, clip, 1e-4)
    torch.testing.assert_close(result.values_NK, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert not result.constant_N.any()


@pytest.mark.parametrize("credit", ["joint", "step_mean"])
def test_advantages_of_a_sample_sum_to_its_standardised_final_reward(credit: str) -> None:
    rewards = random_rewards()
    total = groups(normalise(rewards, credit=credit, std="group")).sum(2)
    final = rewards[:, -1].unflatten(0, (-1, GROUP_SIZE))
    std = rewards.diff().unflatten(0, (-1, GROUP_SIZE)).flatten(1).std(1, correction=0)
    expected = (final - final.mean(1, keepdim=True)) / (std[:, None] + 1e-4)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("credit", "std"), CASES)
def test_advantages_of_a_group_sum_to_zero(credit: str, std: str) -> None:
    total = groups(normalise(random_rewards(), credit=credit, std=std)).sum((1, 2))
    torch.testing.assert_close(total, torch.zeros(NUM_PROMPTS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("credit", ["per_step", "step_mean"])
def test_means_per_step_leave_no_constant_on_any_step(credit: str) -> None:
    by_step = groups(normalise(random_rewards(), credit=credit, std="group")).sum(1)
    torch.testing.assert_close(by_step, torch.zeros(NUM_PROMPTS, NUM_STEPS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("credit", "std"), CASES)
def test_permuting_a_group_permutes_its_advantages(credit: str, std: str) -> None:
    rewards = random_rewards()
    order = torch.arange(len(rewards))
    order[GROUP_SIZE : 2 * GROUP_SIZE] = GROUP_SIZE + torch.randperm(GROUP_SIZE)
    straight = normalise(rewards, credit=credit, std=std).values_NK
    permuted = normalise(rewards[order], credit=credit, std=std).values_NK
    torch.testing.assert_close(permuted, straight[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("credit", "std"), CASES)
def test_scaling_and_shifting_rewards_changes_nothing_up_to_eps(credit: str, std: str) -> None:
    rewards = random_rewards()
    straight = normalise(rewards, credit=credit, std=std, eps=1e-9).values_NK
    scaled = normalise(20 * rewards + 3, credit=credit, std=std, eps=1e-9).values_NK
    torch.testing.assert_close(scaled, straight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("credit", CREDITS)
def test_groups_are_told_by_position_and_do_not_mix(credit: str) -> None:
    # Two groups may come of the same prompt text; each is normalised as if the other were not there.
    first, second = random_rewards()[:GROUP_SIZE], 10 * random_rewards()[:GROUP_SIZE]
    together = normalise(torch.cat([first, second]), credit=credit, std="group").values_NK
    apart = [normalise(rewards, credit=credit, std="group").values_NK for rewards in (first, second)]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("credit", CREDITS)
def test_global_std_leaves_the_means_to_the_groups(credit: str) -> None:
    rewards = torch.cat([random_rewards()[:GROUP_SIZE], 10 * random_rewards()[:GROUP_SIZE]])
    result = groups(normalise(rewards, credit=credit, std="global"))
    torch.testing.assert_close(result.sum((1, 2)), torch.zeros(2), rtol=0, atol=1e-4)
    assert result[1].std() > 5 * result[0].std()


def test_joint_normalisation_keeps_large_early_gains_large_and_per_step_does_not() -> None:
    scale = torch.tensor([8.0, 4.0, 2.0, 1.0])
    gains = torch.randn(GROUP_SIZE, NUM_STEPS) * scale
    rewards = torch.cat([torch.zeros(GROUP_SIZE, 1), gains.cumsum(1)], dim=1)
    joint = normalise(rewards, credit="joint", std="group").values_NK.std(0)
    per_step = normalise(rewards, credit="per_step", std="group").values_NK.std(0)
    assert joint[0] > 3 * joint[3]
    torch.testing.assert_close(per_step, per_step[:1].expand(NUM_STEPS), rtol=1e-3, atol=1e-3)


def test_terminal_credit_gives_every_step_the_standardised_final_reward() -> None:
    rewards = random_rewards()[:GROUP_SIZE]
    final = rewards[:, -1]
    expected = ((final - final.mean()) / (final.std(correction=0) + 1e-4))[:, None].expand(-1, NUM_STEPS)
    every_state = normalise(rewards, credit="terminal", std="group").values_NK
    final_state_only = normalise(rewards[:, -1:], states=(NUM_STEPS,), credit="terminal", std="group").values_NK
    torch.testing.assert_close(every_state, expected)
    torch.testing.assert_close(final_state_only, every_state, rtol=0, atol=0)


def test_advantages_are_clipped_on_both_sides() -> None:
    rewards = torch.zeros(12, 1)
    rewards[0], rewards[6] = 1, -1
    values = normalise(rewards, states=(NUM_STEPS,), credit="terminal", std="group", clip=1.5).values_NK
    assert values.max() == 1.5 and values.min() == -1.5


@pytest.mark.parametrize(("credit", "std"), CASES)
def test_constant_group_gets_exact_zeros_and_is_flagged(credit: str, std: str) -> None:
    rewards = random_rewards()
    rewards[GROUP_SIZE : 2 * GROUP_SIZE] = 0.1
    result = normalise(rewards, credit=credit, std=std)
    expected = torch.zeros(len(rewards), dtype=torch.bool)
    expected[GROUP_SIZE : 2 * GROUP_SIZE] = True
    torch.testing.assert_close(result.constant_N, expected)
    assert not result.values_NK[expected].any()
    assert result.values_NK[~expected].any(dim=1).all()


def test_group_of_equal_final_rewards_is_constant_under_terminal_only() -> None:
    rewards = random_rewards()[:GROUP_SIZE]
    rewards[:, -1] = 0.1
    assert normalise(rewards, credit="terminal", std="group").constant_N.all()
    assert not normalise(rewards, credit="joint", std="group").constant_N.any()


def test_group_of_equal_trajectories_is_constant_where_means_are_per_step() -> None:
    rewards = random_rewards()[:1].expand(GROUP_SIZE, -1)
    for credit in ("per_step", "step_mean"):
        result = normalise(rewards, credit=credit, std="group")
        assert result.constant_N.all() and not result.values_NK.any()
    assert not normalise(rewards, credit="joint", std="group").constant_N.any()


@pytest.mark.parametrize("credit", ["per_step", "step_mean"])
def test_one_step_of_equal_gains_gets_zeros_but_does_not_make_the_group_constant(credit: str) -> None:
    rewards = random_rewards()[:GROUP_SIZE]
    rewards[:, 1] = rewards[:, 0] + 0.1
    result = normalise(rewards, credit=credit, std="group")
    assert not result.values_NK[:, 0].any() and result.values_NK[:, 1:].any()
    assert not result.constant_N.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reward_that_is_not_a_number_is_refused(value: float) -> None:
    rewards = random_rewards()
    rewards[7, 2] = value
    with pytest.raises(ValueError, match=r"1 of 90 rewards are NaN or infinite, the first at .* \[7, 2\]"):
        normalise(rewards, credit="joint", std="group")


def test_samples_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="17 samples do not split into groups of 6"):
        normalise(random_rewards()[:17], credit="joint", std="group")


@pytest.mark.parametrize("credit", CREDITS)
def test_rewards_of_the_wrong_number_of_states_are_refused(credit: str) -> None:
    with pytest.raises(ValueError, match=r"rewards of 3 states were given for the 5 states \[0, 1, 2, 3, 4\]"):
        normalise(random_rewards()[:, :3], credit=credit, std="group")


def test_gains_that_leave_out_the_first_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"states \[1, 2, 3, 4\] leave steps without a gain under credit joint"):
        normalise(random_rewards()[:, 1:], states=(1, 2, 3, 4), credit="joint", std="group")


@pytest.mark.parametrize("credit", ["joint", "per_step", "step_mean"])
def test_steps_between_two_scored_states_share_what_was_gained_between_them(credit: str) -> None:
    rewards = random_rewards()[:, [0, 1, NUM_STEPS]]
    shared = normalise(rewards, states=(0, 1, NUM_STEPS), credit=credit, std="group").values_NK
    two_steps = normalise(rewards, states=(0, 1, 2), credit=credit, std="group").values_NK
    torch.testing.assert_close(shared, two_steps[:, [0, 1, 1, 1]], rtol=0, atol=0)


@pytest.mark.parametrize("credit", ["joint", "per_step", "step_mean"])
def test_scoring_the_two_ends_alone_is_terminal_credit(credit: str) -> None:
    rewards = random_rewards()
    ends = normalise(rewards[:, [0, -1]], states=(0, NUM_STEPS), credit=credit, std="group").values_NK
    terminal = normalise(rewards, credit="terminal", std="group").values_NK
    torch.testing.assert_close(ends, terminal, rtol=1e-4, atol=1e-5)


def test_lambda_one_credits_the_final_reward_less_that_of_the_state() -> None:
    rewards = random_rewards()[:GROUP_SIZE]
    left = rewards[:, -1:] - rewards[:, :-1]
    expected = (left - left.mean(0)) / (left.std(0, correction=0) + 1e-4)
    result = normalise(rewards, credit="per_step", std="group", gae_lambda=1.0).values_NK
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
