"""One update against a loss written out for one image and one step at a time, and the sanity checks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from sfgrpo.errors import SanityCheckError
from sfgrpo.grpo.sanity import require_changed_sampler
from sfgrpo.grpo.update import Objective, UpdateOutcome, make_scaler, update_policy
from sfgrpo.policies.base import Policy
from sfgrpo.types import RolloutBatch
from tests.support import oracles
from tests.support.tiny import counted_passes, disturb, make_tiny_pipeline, make_tiny_policy
from tests.support.update import (
    NOISE_LEVEL,
    NUM_IMAGES,
    ROLLOUT_BATCH,
    objective_for,
    rolled_out,
    spoil_gradient,
    weights,
)


@pytest.fixture
def policy() -> Policy:
    policy = make_tiny_policy()
    disturb(policy)
    return policy


def updated(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    scaler: torch.amp.GradScaler | None = None,
) -> UpdateOutcome:
    """Updates in this process alone, by default without a loss scale."""
    scaler = scaler or make_scaler("float32", policy.device)
    return update_policy(policy, optimizer, batch, objective, Accelerator(), scaler)


def plain_descent(policy: Policy) -> torch.optim.Optimizer:
    """Makes the optimiser whose step is minus the gradient."""
    return torch.optim.SGD(policy.adapter_parameters().values(), lr=1.0)


def naive_loss(policy: Policy, batch: RolloutBatch, objective: Objective, rows: range) -> torch.Tensor:
    """Writes the objective out: mean over images and steps of -min(ratio A, clip(ratio) A) + kl_coef KL."""
    sigmas, update, total = objective.sigmas_S, objective.update, torch.zeros(())
    for n in rows:
        for k in objective.trained_steps:
            x, taken = batch.trajectory.latents_NSCHW[n, k], batch.trajectory.latents_NSCHW[n, k + 1]
            arguments = (x[None], sigmas[[k]], batch.conditioning[[n]], objective.sampling.guidance_scale)
            t, p, sigma_max = sigmas[k].item(), sigmas[k + 1].item(), sigmas[1].item()
            mean, std = oracles.flow_sde(x, policy.velocity(*arguments)[0], t, p, sigma_max, NOISE_LEVEL)
            log_prob = torch.distributions.Normal(mean, std).log_prob(taken).mean()
            ratio = torch.exp(log_prob - batch.trajectory.log_probs_NK[n, k])
            advantage = batch.advantages_NK[n, k]
            clipped = ratio.clamp(1 - update.clip_range, 1 + update.clip_range)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
            if update.kl_coef:
                start, _ = oracles.flow_sde(x, policy.reference_velocity(*arguments)[0], t, p, sigma_max, NOISE_LEVEL)
                one, other = torch.distributions.Normal(mean, std), torch.distributions.Normal(start, std)
                kl = torch.distributions.kl_divergence(one, other).mean()
                total = total + update.kl_coef * kl * (t - p if update.kl_form == "flow_grpo" else 1)
    return total / (len(rows) * len(objective.trained_steps))


def naive_update(policy: Policy, batch: RolloutBatch, objective: Objective) -> None:
    """Takes the plain descent steps of the naive loss, share by share."""
    share = NUM_IMAGES // objective.update.steps_per_update
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
    updated(policy, plain_descent(policy), batch, objective)
    moved, expected = weights(policy) - start, weights(other) - start
    assert expected.norm() > 0
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_ratio_of_the_first_step_is_exactly_one(policy):
    metrics = updated(policy, plain_descent(policy), rolled_out(policy), objective_for(policy)).metrics
    assert metrics["policy/ratio_deviation_first_pass"] == 0
    assert metrics["policy/ratio_mean"] == 1
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == 0


def test_ratio_of_a_second_step_is_not(policy):
    objective = objective_for(policy, steps_per_update=2)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-2)
    metrics = updated(policy, optimizer, rolled_out(policy), objective).metrics
    assert metrics["policy/ratio_deviation_first_pass"] == 0
    assert metrics["policy/ratio_deviation"] > 0


def test_loss_before_any_step_is_minus_the_mean_advantage(policy):
    batch, objective = rolled_out(policy), objective_for(policy)
    metrics = updated(policy, plain_descent(policy), batch, objective).metrics
    assert metrics["policy/loss"] == pytest.approx(-batch.advantages_NK[:, [0, 1]].mean().item(), abs=1e-6)


def test_gradient_is_clipped_to_its_norm(policy):
    batch, start = rolled_out(policy), weights(policy)
    metrics = updated(policy, plain_descent(policy), batch, objective_for(policy, max_grad_norm=1e-3)).metrics
    assert metrics["optim/grad_norm"] > 1e-3
    assert float((weights(policy) - start).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_no_gradient_is_left_behind(policy):
    updated(policy, plain_descent(policy), rolled_out(policy), objective_for(policy))
    assert all(parameter.grad is None for parameter in policy.adapter_parameters().values())


def test_constant_groups_change_nothing_and_cost_no_pass():
    moves, passes, losses = [], [], []
    for is_dropped in (True, False):
        policy = make_tiny_policy()
        disturb(policy)
        start, batch = weights(policy), rolled_out(policy, constant=(2, 3, 6, 7))
        batch = dataclasses.replace(batch, constant_N=batch.constant_N & is_dropped)
        with counted_passes(policy) as sizes:
            metrics = updated(policy, plain_descent(policy), batch, objective_for(policy)).metrics
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
        metrics = updated(policy, optimizer, batch, objective_for(policy, steps_per_update=steps_per_update)).metrics
    assert not sizes and torch.equal(weights(policy), start)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["optim/grad_norm"] == 0 and metrics["policy/ratio_mean"] == 1


def test_share_without_advantages_does_not_stop_the_other(policy):
    batch, start = rolled_out(policy, constant=(0, 1, 2, 3)), weights(policy)
    updated(policy, plain_descent(policy), batch, objective_for(policy, steps_per_update=2))
    assert not torch.equal(weights(policy), start)


def test_kl_of_zero_weight_costs_no_reference_pass(policy, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the reference policy was asked")

    batch = rolled_out(policy)
    with counted_passes(policy) as sizes:
        updated(policy, plain_descent(policy), batch, objective_for(policy, kl_coef=0.1))
    assert sum(sizes) == 2 * NUM_IMAGES * 2
    monkeypatch.setattr(policy, "reference_velocity", refuse)
    batch = rolled_out(policy)
    updated(policy, plain_descent(policy), batch, objective_for(policy))


def test_kl_is_reported_as_a_mean_and_is_zero_for_the_start_policy(policy):
    objective, batch = objective_for(policy, kl_coef=1.0), rolled_out(policy)
    with_kl = naive_loss(policy, batch, objective, range(NUM_IMAGES)).detach()
    without = naive_loss(policy, batch, objective_for(policy), range(NUM_IMAGES)).detach()
    metrics = updated(policy, plain_descent(policy), batch, objective).metrics
    assert metrics["policy/kl_reference"] == pytest.approx((with_kl - without).item(), rel=1e-3)
    fresh = make_tiny_policy()
    metrics = updated(fresh, plain_descent(fresh), rolled_out(fresh), objective).metrics
    assert metrics["policy/kl_reference"] == 0


def test_tampered_log_prob_is_noticed(policy):
    batch = rolled_out(policy)
    batch.trajectory.log_probs_NK[5, 1] += 0.01
    start = weights(policy)
    with pytest.raises(
        SanityCheckError, match=r"the ratio is off 1 by 0\.0\d+, more than update.ratio_tolerance 0.001"
    ):
        updated(policy, plain_descent(policy), batch, objective_for(policy))
    assert torch.equal(weights(policy), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter_that_does_not_learn_is_noticed(dtype):
    policy = make_tiny_policy(dtype=dtype)
    batch = rolled_out(policy)
    objective = objective_for(policy, ratio_tolerance=1.0)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.0)
    updated(policy, optimizer, batch, objective)
    with pytest.raises(SanityCheckError, match="the sampler's output did not change with the first update"):
        require_changed_sampler(policy, batch, ROLLOUT_BATCH, objective, Accelerator())


def test_adapter_that_learns_passes(policy):
    batch, objective = rolled_out(policy), objective_for(policy)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-4)
    updated(policy, optimizer, batch, objective)
    require_changed_sampler(policy, batch, ROLLOUT_BATCH, objective, Accelerator())


def test_frozen_adapter_is_noticed(policy):
    batch, optimizer = rolled_out(policy), plain_descent(policy)
    policy.module.requires_grad_(False)
    with pytest.raises(SanityCheckError, match="no trainable parameter takes part in the loss"):
        updated(policy, optimizer, batch, objective_for(policy))


def test_metrics_are_means_over_terms_not_over_micro_batches(policy):
    numbers = []
    for micro_batch_size in (8, 5):
        batch = rolled_out(policy)
        batch.trajectory.log_probs_NK[:, :2] += torch.linspace(-0.01, 0.01, NUM_IMAGES)[:, None]
        objective = objective_for(policy, micro_batch_size=micro_batch_size, ratio_tolerance=1e9)
        optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-9)
        numbers.append(updated(policy, optimizer, batch, objective).metrics)
    assert numbers[0]["policy/clip_fraction"] > 0
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)


def test_update_tells_whether_there_was_anything_to_learn(policy):
    objective, batch = objective_for(policy), rolled_out(policy)
    assert updated(policy, plain_descent(policy), batch, objective).trained
    nothing = dataclasses.replace(batch, advantages_NK=torch.zeros_like(batch.advantages_NK))
    assert not updated(policy, plain_descent(policy), nothing, objective_for(policy, ratio_tolerance=1e9)).trained


@contextlib.contextmanager
def planted(policy: Policy, call: int, value: float) -> Iterator[None]:
    """Puts `value` into the velocity of the first image of a call of the transformer, counted from 0."""
    calls = itertools.count()

    def spoil(module, arguments, output):
        if next(calls) == call:
            output[0].data[0] = value

    hook = policy.module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def adamw(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_velocity_that_is_no_number_costs_its_own_optimiser_step_alone(policy, value):
    batch, start, optimizer = rolled_out(policy), weights(policy), plain_descent(policy)
    objective = objective_for(policy, steps_per_update=2)
    # The second share, images 4 to 7, has one pass for each of two steps: calls 2 and 3.
    with planted(policy, 2, value):
        outcome = updated(policy, optimizer, batch, objective)
    assert outcome.broken_loss_N.nonzero().flatten().tolist() == [4]
    assert not outcome.broken_gradient_N.any() and not outcome.trained
    assert outcome.metrics["guards/skipped_steps"] == 1
    assert all(math.isfinite(number) for number in outcome.metrics.values())
    other = make_tiny_policy()
    disturb(other)
    first_share = RolloutBatch(
        trajectory=dataclasses.replace(
            batch.trajectory,
            latents_NSCHW=batch.trajectory.latents_NSCHW[:4],
            velocities_NKCHW=batch.trajectory.velocities_NKCHW[:4],
            log_probs_NK=batch.trajectory.log_probs_NK[:4],
        ),
        conditioning=batch.conditioning[:4],
        advantages_NK=batch.advantages_NK[:4],
        constant_N=batch.constant_N[:4],
    )
    updated(other, plain_descent(other), first_share, objective_for(other))
    assert not torch.equal(weights(policy), start)
    assert torch.equal(weights(policy), weights(other))


def test_nothing_that_is_no_number_reaches_weights_optimiser_or_metrics(policy):
    batch, start, optimizer = rolled_out(policy), weights(policy), adamw(policy)
    batch.advantages_NK[3, 1] = math.inf
    outcome = updated(policy, optimizer, batch, objective_for(policy))
    assert outcome.broken_loss_N.nonzero().flatten().tolist() == [3]
    assert torch.equal(weights(policy), start) and not optimizer.state
    assert all(parameter.grad is None for parameter in policy.adapter_parameters().values())
    finite = batch.advantages_NK[:, :2].flatten()
    finite = finite[finite.isfinite()]
    assert outcome.metrics["policy/loss"] == pytest.approx(-finite.mean().item(), abs=1e-6)
    assert outcome.metrics["policy/ratio_mean"] == 1 and outcome.metrics["optim/grad_norm"] == 0


def test_log_prob_of_the_rollout_that_is_no_number_is_no_failed_sanity_check(policy):
    batch = rolled_out(policy)
    batch.trajectory.log_probs_NK[2, 0] = math.nan
    outcome = updated(policy, adamw(policy), batch, objective_for(policy))
    assert outcome.broken_loss_N.nonzero().flatten().tolist() == [2]
    assert outcome.metrics["policy/ratio_deviation_first_pass"] == 0


def test_all_losses_no_numbers_still_give_metrics(policy):
    batch = rolled_out(policy)
    batch.advantages_NK[:] = math.nan
    outcome = updated(policy, adamw(policy), batch, objective_for(policy))
    assert outcome.broken_loss_N.all()
    assert all(math.isfinite(number) for number in outcome.metrics.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_no_number_is_blamed_on_the_trained_images_of_its_share(policy, value):
    batch, start, optimizer = rolled_out(policy, constant=(0, 1)), weights(policy), adamw(policy)
    spoil_gradient(policy, value)
    outcome = updated(policy, optimizer, batch, objective_for(policy, steps_per_update=2))
    assert outcome.broken_gradient_N.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert not outcome.broken_loss_N.any() and outcome.metrics["guards/skipped_steps"] == 2
    assert torch.equal(weights(policy), start) and not optimizer.state
    assert outcome.metrics["optim/grad_norm"] == 0


def test_deterministic_step_in_the_objective_is_a_programming_error(policy):
    with pytest.raises(ValueError, match="took a step whose std is not above 0"):
        updated(policy, adamw(policy), rolled_out(policy), objective_for(policy, sampler="ode"))


def half_policy(dtype: torch.dtype) -> Policy:
    """Makes the tiny policy with frozen weights of another type."""
    pipeline = make_tiny_pipeline()
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        torch.nn.Module.to(module, dtype)
    policy = make_tiny_policy(pipeline, dtype=dtype)
    disturb(policy)
    return policy


def test_float16_trains_with_a_scaled_loss_as_float32_does_without(policy):
    half = half_policy(torch.float16)
    scaler = make_scaler("float16", half.device)
    moves = []
    for each, its_scaler in ((policy, make_scaler("float32", policy.device)), (half, scaler)):
        start, batch = weights(each), rolled_out(each)
        outcome = updated(each, plain_descent(each), batch, objective_for(each), its_scaler)
        moves.append(weights(each) - start)
    assert outcome.metrics["optim/overflow_steps"] == 0 and outcome.metrics["optim/loss_scale"] == 2**16
    assert outcome.trained and outcome.metrics["policy/ratio_deviation_first_pass"] == 0
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.99


def test_gradient_too_small_for_float16_is_lost_without_the_scale():
    kept = []
    for dtype in ("float16", "float32"):
        half = half_policy(torch.float16)
        batch = rolled_out(half)
        batch = dataclasses.replace(batch, advantages_NK=1e-6 * batch.advantages_NK)
        start = weights(half)
        optimizer = torch.optim.SGD(half.adapter_parameters().values(), lr=1e4)
        updated(half, optimizer, batch, objective_for(half), make_scaler(dtype, half.device))
        kept.append(int((weights(half) != start).sum()))
    assert kept[0] > 1.5 * kept[1]


def test_overflow_lowers_the_scale_and_skips_the_step_without_blame():
    half = half_policy(torch.float16)
    scaler, start, optimizer = make_scaler("float16", half.device), weights(half), adamw(half)
    spoil_gradient(half, math.inf)
    outcome = updated(half, optimizer, rolled_out(half), objective_for(half, steps_per_update=2), scaler)
    assert outcome.metrics["optim/overflow_steps"] == 2 and outcome.metrics["optim/loss_scale"] == 2**14
    assert outcome.metrics["guards/skipped_steps"] == 0 and not outcome.trained
    assert not outcome.broken_gradient_N.any()
    assert torch.equal(weights(half), start) and not optimizer.state


def test_overflow_at_the_lowest_scale_is_broken_and_leaves_the_scale():
    half = half_policy(torch.float16)
    scaler = make_scaler("float16", half.device)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})
    spoil_gradient(half, math.nan)
    outcome = updated(half, adamw(half), rolled_out(half), objective_for(half), scaler)
    assert outcome.metrics["optim/overflow_steps"] == 0 and outcome.metrics["optim/loss_scale"] == 1
    assert outcome.metrics["guards/skipped_steps"] == 1 and outcome.broken_gradient_N.all()


def test_loss_that_is_no_number_leaves_the_scale_alone():
    half = half_policy(torch.float16)
    scaler, batch = make_scaler("float16", half.device), rolled_out(half)
    with planted(half, 0, math.inf):
        outcome = updated(half, adamw(half), batch, objective_for(half), scaler)
    assert outcome.broken_loss_N.any() and outcome.metrics["optim/loss_scale"] == 2**16


class NoScaler:
    """Does what a loop without a scaler does."""

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass

    def get_scale(self):
        return 1.0

    def is_enabled(self):
        return False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaler_of_other_types_changes_no_bit(dtype):
    ends = []
    for scaler in (make_scaler(dtype, torch.device("cpu")), NoScaler()):
        policy = half_policy(getattr(torch, dtype))
        outcome = updated(policy, adamw(policy), rolled_out(policy), objective_for(policy), scaler)
        ends.append(weights(policy))
        assert outcome.trained and not {"optim/loss_scale", "optim/overflow_steps"} & outcome.metrics.keys()
    assert torch.equal(*ends)
