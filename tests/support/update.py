"""Rollouts and objectives of the tiny policy, for tests of the update."""

from __future__ import annotations

import torch

from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.update import Objective
from sfgrpo.policies.base import Policy
from sfgrpo.types import RolloutBatch
from tests.support.tiny import tiny_prompts

NUM_IMAGES, NUM_STEPS = 8, 3
NOISE_LEVEL = 0.7
ROLLOUT_BATCH = 4


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
    """Roll out and draw random advantages; the images `constant` get zeros."""
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
        micro_batch_size=ROLLOUT_BATCH,
    )
    advantages = torch.randn(NUM_IMAGES, NUM_STEPS, generator=generator)
    constant_N = torch.zeros(NUM_IMAGES, dtype=torch.bool)
    constant_N[list(constant)] = True
    advantages[constant_N] = 0
    return RolloutBatch(
        trajectory=trajectory, conditioning=conditioning, advantages_NK=advantages, constant_N=constant_N
    )


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.adapter_parameters().values()])


def spoil_gradient(policy: Policy, value: float) -> None:
    """Set one number of every gradient of one weight to `value`."""
    parameter = next(iter(policy.adapter_parameters().values()))

    def spoil(gradient):
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    parameter.register_hook(spoil)
