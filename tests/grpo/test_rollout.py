"""The rollout against one image and one step at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.config.schema import SamplingConfig
from sfgrpo.grpo.distributed import row_slices
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.policies.base import Policy
from sfgrpo.types import Trajectory, joined
from tests.support import oracles
from tests.support.tiny import counted_passes, disturb, make_tiny_pipeline, make_tiny_policy, tiny_prompts

NUM_IMAGES, NUM_STEPS = 4, 3


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = make_tiny_policy()
    disturb(policy)
    return policy


def noises(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(NUM_IMAGES, *policy.latent_shape, generator=generator)
    return start, torch.randn(NUM_IMAGES, NUM_STEPS, *policy.latent_shape, generator=generator)


def rolled_out(
    policy: Policy, sampler: str = "flow_sde", guidance_scale: float = 1.0, rows: slice = slice(None)
) -> Trajectory:
    sampling = SamplingConfig(sampler=sampler, num_steps=NUM_STEPS, noise_level=0.7, guidance_scale=guidance_scale)
    conditioning = policy.encode([prompt.text for prompt in tiny_prompts(NUM_IMAGES)])[rows]
    start, noise = noises(policy)
    return roll_out(policy, conditioning, start[rows], noise[rows], policy.sigmas(NUM_STEPS), sampling)


def test_every_state_velocity_and_log_prob_is_kept(policy):
    trajectory = rolled_out(policy)
    assert trajectory.latents_NSCHW.shape == (NUM_IMAGES, NUM_STEPS + 1, *policy.latent_shape)
    assert trajectory.velocities_NKCHW.shape == (NUM_IMAGES, NUM_STEPS, *policy.latent_shape)
    assert trajectory.log_probs_NK.shape == (NUM_IMAGES, NUM_STEPS)
    assert torch.equal(trajectory.latents_NSCHW[:, 0], noises(policy)[0])


@pytest.mark.parametrize("sampler", ["flow_sde", "ddim_sde", "cps", "ode"])
def test_steps_are_those_of_the_sampler(policy, sampler):
    trajectory, sigmas, (_, noise) = rolled_out(policy, sampler), policy.sigmas(NUM_STEPS), noises(policy)
    texts = [prompt.text for prompt in tiny_prompts(NUM_IMAGES)]
    for n in range(NUM_IMAGES):
        for k in range(NUM_STEPS):
            x, taken = trajectory.latents_NSCHW[n, k], trajectory.latents_NSCHW[n, k + 1]
            with torch.no_grad():
                velocity = policy.velocity(x[None], sigmas[[k]], policy.encode([texts[n]]))[0]
            torch.testing.assert_close(trajectory.velocities_NKCHW[n, k], velocity, rtol=1e-4, atol=1e-5)
            mean, std = oracles.SAMPLERS[sampler](
                x.double().numpy(),
                trajectory.velocities_NKCHW[n, k].double().numpy(),
                *sigmas[[k, k + 1]].tolist(),
                sigmas[1].item(),
                0.7,
            )
            expected = torch.from_numpy(mean) + std * noise[n, k]
            torch.testing.assert_close(taken.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["flow_sde", "ddim_sde", "cps"])
def test_log_probs_are_those_of_the_noise_that_was_drawn(policy, sampler):
    trajectory, sigmas, (_, noise) = rolled_out(policy, sampler), policy.sigmas(NUM_STEPS), noises(policy)
    for k in range(NUM_STEPS - 1):
        _, std = oracles.SAMPLERS[sampler](0.0, 0.0, *sigmas[[k, k + 1]].tolist(), sigmas[1].item(), 0.7)
        density = torch.distributions.Normal(0.0, std).log_prob(std * noise[:, k]).mean(dim=(1, 2, 3))
        torch.testing.assert_close(trajectory.log_probs_NK[:, k], density, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "has_density"),
    [("ode", [False, False, False]), ("ddim_sde", [True, True, False]), ("flow_sde", [True, True, True])],
)
def test_step_without_density_has_no_log_prob(policy, sampler, has_density):
    log_probs = rolled_out(policy, sampler).log_probs_NK
    assert (~log_probs.isnan()).tolist() == [has_density] * NUM_IMAGES


def test_micro_batches_change_no_image(policy):
    together = rolled_out(policy)
    apart = joined([rolled_out(policy, rows=rows) for rows in row_slices(NUM_IMAGES, 3)])
    for field in ("latents_NSCHW", "velocities_NKCHW", "log_probs_NK"):
        torch.testing.assert_close(getattr(apart, field), getattr(together, field), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "passes_per_step"), [(1.0, 1), (4.5, 2)])
def test_rollout_costs_one_pass_per_step_and_two_with_guidance(policy, scale, passes_per_step):
    with counted_passes(policy) as sizes:
        rolled_out(policy, guidance_scale=scale)
    assert sum(sizes) == NUM_IMAGES * NUM_STEPS * passes_per_step
    assert len(sizes) == NUM_STEPS


def test_rollout_of_no_image_still_makes_every_pass(policy):
    with counted_passes(policy) as sizes:
        trajectory = rolled_out(policy, rows=slice(0, 0))
    assert len(sizes) == NUM_STEPS and len(trajectory.latents_NSCHW) == 0


def test_rollout_keeps_no_gradient(policy):
    assert not rolled_out(policy).log_probs_NK.requires_grad


def test_states_of_a_bfloat16_policy_are_float32():
    policy = make_tiny_policy(make_tiny_pipeline().to(torch.bfloat16), dtype=torch.bfloat16)
    trajectory = rolled_out(policy)
    assert trajectory.latents_NSCHW.dtype == trajectory.log_probs_NK.dtype == torch.float32
    latents = trajectory.latents_NSCHW
    assert not torch.equal(latents, latents.bfloat16().float())


@pytest.mark.parametrize(("rows", "size", "expected"), [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (1, 9, [1]), (0, 3, [])])
def test_row_slices_cover_every_row_once(rows, size, expected):
    slices = row_slices(rows, size)
    assert [part.stop - part.start for part in slices] == expected
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
