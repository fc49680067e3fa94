"""One update against a loss written out for one image and one step at a time, and the canaries."""

from __future__ import annotations

import dataclasses
import math

import oracles
import pytest
import torch
from accelerate import Accelerator
from tiny import counted_passes, disturb, make_tiny_policy, tiny_prompts

from sfgrpo.errors import CanaryError
from sfgrpo.policies.base import Policy
from sfgrpo.rollout import roll_out
from sfgrpo.types import RolloutBatch
from sfgrpo.update import Objective, require_changed_sampler, update_policy

NUM_IMAGES, GROUP_SIZE, NUM_STEPS = 8, 2, 3
NOISE_LEVEL = 0.7


@pytest.fixture
def policy() -> Policy:
    policy = make_tiny_policy()
    disturb(policy)
    return policy


def objective_for(policy: Policy, **changes) -> Objective:
    options = {
        "sigmas_S": policy.sigmas(NUM_STEPS),
        "sampler": "flow_sde",
        "noise_level": NOISE_LEVEL,
        "guidance_scale": 1.0,
        "trained_steps": (0, 1),
        "clip_range": 1e-3,
        "kl_coef": 0.0,
        "kl_form": "exact",
        "max_grad_norm": 1e9,
        "steps_per_update": 1,
        "micro_batch_size": 4,
        "ratio_tolerance": 1e-3,
    }
    return Objective(**options | changes)


def rolled_out(policy: Policy, constant: tuple[int, ...] = ()) -> RolloutBatch:
    """Rolls out and gives random advantages; the images `constant` get zeros."""
    generator = torch.Generator().manual_seed(4)
    conditioning = policy.encode([prompt.text for prompt in tiny_prompts(NUM_IMAGES)])
    trajectory = roll_out(
        policy,
        conditioning,
        torch.randn(NUM_IMAGES, *policy.latent_shape, generator=generator),
        torch.randn(NUM_IMAGES, NUM_STEPS, *policy.latent_shape, generator=generator),
        policy.sigmas(NUM_STEPS),
        sampler="flow_sde",
        noise_level=NOISE_LEVEL,
        guidance_scale=1.0,
        micro_batch_size=4,
    )
    advantages = torch.randn(NUM_IMAGES, NUM_STEPS, generator=generator)
    constant_N = torch.zeros(NUM_IMAGES, dtype=torch.bool)
    constant_N[list(constant)] = True
    advantages[constant_N] = 0
    return RolloutBatch(
        trajectory=trajectory, conditioning=conditioning, advantages_NK=advantages, constant_N=constant_N
    )


def plain_descent(policy: Policy) -> torch.optim.Optimizer:
    """Makes the optimiser whose step is minus the gradient."""
    return torch.optim.SGD(policy.adapter_parameters().values(), lr=1.0)


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.adapter_parameters().values()])


def naive_loss(policy: Policy, batch: RolloutBatch, objective: Objective, rows: range) -> torch.Tensor:
    """Writes the objective out: mean over images and steps of -min(ratio A, clip(ratio) A) + kl_coef KL."""
    sigmas, total = objective.sigmas_S, torch.zeros(())
    for n in rows:
        for k in objective.trained_steps:
            x, taken = batch.trajectory.latents_NSCHW[n, k], batch.trajectory.latents_NSCHW[n, k + 1]
            arguments = (x[None], sigmas[[k]], batch.conditioning[[n]], objective.guidance_scale)
            t, p, sigma_max = sigmas[k].item(), sigmas[k + 1].item(), sigmas[1].item()
            mean, std = oracles.flow_sde(x, policy.velocity(*arguments)[0], t, p, sigma_max, NOISE_LEVEL)
            log_prob = torch.distributions.Normal(mean, std).log_prob(taken).mean()
            ratio = torch.exp(log_prob - batch.trajectory.log_probs_NK[n, k])
            advantage = batch.advantages_NK[n, k]
            clipped = ratio.clamp(1 - objective.clip_range, 1 + objective.clip_range)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
            if objective.kl_coef:
                start, _ = oracles.flow_sde(x, policy.reference_velocity(*arguments)[0], t, p, sigma_max, NOISE_LEVEL)
                one, other = torch.distributions.Normal(mean, std), torch.distributions.Normal(start, std)
                kl = torch.distributions.kl_divergence(one, other).mean()
                total = total + objective.kl_coef * kl * (t - p if objective.kl_form == "flow_grpo" else 1)
    return total / (len(rows) * len(objective.trained_steps))


def naive_update(policy: Policy, batch: RolloutBatch, objective: Objective) -> None:
    """Takes the plain descent steps of the naive loss, share by share."""
    share = NUM_IMAGES // objective.steps_per_update
    parameters = list(policy.adapter_parameters().values())
    for first in range(0, NUM_IMAGES, share):
        loss = naive_loss(policy, batch, objective, range(first, first + share))
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= gradient


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trained_steps": (1,), "micro_batch_size": 3},
        {"steps_per_update": 2},
        {"kl_coef": 0.05},
        {"kl_coef": 0.05, "kl_form": "flow_grpo"},
        {"guidance_scale": 2.0, "clip_range": 1e-6, "ratio_tolerance": 1e9},
    ],
    ids=str,
)
def test_update_is_descent_on_the_loss_written_out(policy, changes):
    other = make_tiny_policy()
    disturb(other)
    batch, objective = rolled_out(policy), objective_for(policy, **changes)
    start = weights(policy)
    naive_update(other, batch, objective)
    update_policy(policy, plain_descent(policy), batch, objective, Accelerator())
    moved, expected = weights(policy) - start, weights(other) - start
    assert expected.norm() > 0
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_ratio_of_the_first_step_is_exactly_one(policy):
    metrics = update_policy(policy, plain_descent(policy), rolled_out(policy), objective_for(policy), Accelerator())
    assert metrics["policy/ratio_deviation_first_pass"] == 0
    assert metrics["policy/ratio_mean"] == 1
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == 0


def test_ratio_of_a_second_step_is_not(policy):
    objective = objective_for(policy, steps_per_update=2)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-2)
    metrics = update_policy(policy, optimizer, rolled_out(policy), objective, Accelerator())
    assert metrics["policy/ratio_deviation_first_pass"] == 0
    assert metrics["policy/ratio_deviation"] > 0


def test_loss_before_any_step_is_minus_the_mean_advantage(policy):
    batch, objective = rolled_out(policy), objective_for(policy)
    metrics = update_policy(policy, plain_descent(policy), batch, objective, Accelerator())
    assert metrics["policy/loss"] == pytest.approx(-batch.advantages_NK[:, [0, 1]].mean().item(), abs=1e-6)


def test_gradient_is_clipped_to_its_norm(policy):
    batch, start = rolled_out(policy), weights(policy)
    metrics = update_policy(
        policy, plain_descent(policy), batch, objective_for(policy, max_grad_norm=1e-3), Accelerator()
    )
    assert metrics["optim/grad_norm"] > 1e-3
    assert float((weights(policy) - start).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_no_gradient_is_left_behind(policy):
    update_policy(policy, plain_descent(policy), rolled_out(policy), objective_for(policy), Accelerator())
    assert all(parameter.grad is None for parameter in policy.adapter_parameters().values())


def test_constant_groups_change_nothing_and_cost_no_pass():
    moves, passes, losses = [], [], []
    for is_dropped in (True, False):
        policy = make_tiny_policy()
        disturb(policy)
        start, batch = weights(policy), rolled_out(policy, constant=(2, 3, 6, 7))
        batch = dataclasses.replace(batch, constant_N=batch.constant_N & is_dropped)
        with counted_passes(policy) as sizes:
            metrics = update_policy(policy, plain_descent(policy), batch, objective_for(policy), Accelerator())
        moves.append(weights(policy) - start)
        passes.append(sum(sizes))
        losses.append(metrics["policy/loss"])
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-5)
    assert passes == [4 * 2, 8 * 2]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("steps_per_update", [1, 2])
def test_update_of_constant_groups_only_does_nothing_at_all(policy, steps_per_update):
    batch, start = rolled_out(policy, constant=tuple(range(NUM_IMAGES))), weights(policy)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-2, weight_decay=0.1)
    with counted_passes(policy) as sizes:
        metrics = update_policy(
            policy, optimizer, batch, objective_for(policy, steps_per_update=steps_per_update), Accelerator()
        )
    assert not sizes and torch.equal(weights(policy), start)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["optim/grad_norm"] == 0 and metrics["policy/ratio_mean"] == 1


def test_share_without_advantages_does_not_stop_the_other(policy):
    batch, start = rolled_out(policy, constant=(0, 1, 2, 3)), weights(policy)
    update_policy(policy, plain_descent(policy), batch, objective_for(policy, steps_per_update=2), Accelerator())
    assert not torch.equal(weights(policy), start)


def test_kl_of_zero_weight_costs_no_reference_pass(policy, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the reference policy was asked")

    batch = rolled_out(policy)
    with counted_passes(policy) as sizes:
        update_policy(policy, plain_descent(policy), batch, objective_for(policy, kl_coef=0.1), Accelerator())
    assert sum(sizes) == 2 * NUM_IMAGES * 2
    monkeypatch.setattr(policy, "reference_velocity", refuse)
    batch = rolled_out(policy)
    update_policy(policy, plain_descent(policy), batch, objective_for(policy), Accelerator())


def test_kl_is_reported_as_a_mean_and_is_zero_for_the_start_policy(policy):
    objective, batch = objective_for(policy, kl_coef=1.0), rolled_out(policy)
    with_kl = naive_loss(policy, batch, objective, range(NUM_IMAGES)).detach()
    without = naive_loss(policy, batch, objective_for(policy), range(NUM_IMAGES)).detach()
    metrics = update_policy(policy, plain_descent(policy), batch, objective, Accelerator())
    assert metrics["policy/kl_reference"] == pytest.approx((with_kl - without).item(), rel=1e-3)
    fresh = make_tiny_policy()
    metrics = update_policy(fresh, plain_descent(fresh), rolled_out(fresh), objective, Accelerator())
    assert metrics["policy/kl_reference"] == 0


def test_tampered_log_prob_is_noticed(policy):
    batch = rolled_out(policy)
    batch.trajectory.log_probs_NK[5, 1] += 0.01
    start = weights(policy)
    with pytest.raises(CanaryError, match=r"the ratio is off 1 by 0\.0\d+, more than update.ratio_tolerance 0.001"):
        update_policy(policy, plain_descent(policy), batch, objective_for(policy), Accelerator())
    assert torch.equal(weights(policy), start)


def test_adapter_that_does_not_learn_is_noticed(policy):
    batch, objective = rolled_out(policy), objective_for(policy)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.0)
    update_policy(policy, optimizer, batch, objective, Accelerator())
    with pytest.raises(CanaryError, match="the sampler's output did not change with the first update"):
        require_changed_sampler(policy, batch, objective)


def test_adapter_that_learns_passes(policy):
    batch, objective = rolled_out(policy), objective_for(policy)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-4)
    update_policy(policy, optimizer, batch, objective, Accelerator())
    require_changed_sampler(policy, batch, objective)


def test_frozen_adapter_is_noticed(policy):
    batch, optimizer = rolled_out(policy), plain_descent(policy)
    policy.module.requires_grad_(False)
    with pytest.raises(CanaryError, match="no trainable parameter takes part in the loss"):
        update_policy(policy, optimizer, batch, objective_for(policy), Accelerator())


def test_gradient_that_is_no_number_is_noticed(policy):
    batch = rolled_out(policy)
    batch.advantages_NK[0, 0] = float("inf")
    with pytest.raises(CanaryError, match=r"the norm of the gradient is (inf|nan)"):
        update_policy(policy, plain_descent(policy), batch, objective_for(policy), Accelerator())
