"""Builds what an update of the tiny policy needs: its objective, and a rollout with random advantages."""

from __future__ import annotations

from typing import Any

import torch

from sfgrpo.config.schema import SamplingConfig, UpdateConfig
from sfgrpo.grpo.distributed import row_slices
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.update import Objective
from sfgrpo.policies.base import Policy
from sfgrpo.types import RolloutBatch, joined
from tests.support.tiny import tiny_prompts

NUM_IMAGES, NUM_STEPS = 8, 3
ROLLOUT_BATCH = 4
NOISE_LEVEL = 0.7

UPDATE: dict[str, Any] = {
    "num_updates": 1,
    "steps_per_update": 1,
    "learning_rate": 1.0,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "clip_range": 1e-3,
    "kl_form": "exact",
    "trained_steps": (0, 1),
    "micro_batch_size": 4,
    "ratio_tolerance": 1e-3,
    "max_broken_updates": 0,
}


def sampling_for(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**{"sampler": "flow_sde", "num_steps": NUM_STEPS, "noise_level": NOISE_LEVEL} | changes)


def objective_for(policy: Policy, sampler: str = "flow_sde", guidance_scale: float = 1.0, **changes: Any) -> Objective:
    """Makes an objective; what is not `sampler` or `guidance_scale` changes the section `update`."""
    update = UpdateConfig(**UPDATE | changes)
    assert update.trained_steps is not None
    # Not by Objective.of, which refuses the deterministic steps that one test is about.
    return Objective(
        sampling=sampling_for(sampler=sampler, guidance_scale=guidance_scale),
        update=update,
        sigmas_S=policy.sigmas(NUM_STEPS),
        trained_steps=update.trained_steps,
        micro_batch_size=update.micro_batch_size,
    )


def rolled_out(policy: Policy, constant: tuple[int, ...] = ()) -> RolloutBatch:
    """Rolls out and gives random advantages; the images `constant` get zeros."""
    generator = torch.Generator().manual_seed(4)
    conditioning = policy.encode([prompt.text for prompt in tiny_prompts(NUM_IMAGES)])
    start = torch.randn(NUM_IMAGES, *policy.latent_shape, generator=generator)
    noise = torch.randn(NUM_IMAGES, NUM_STEPS, *policy.latent_shape, generator=generator)
    trajectory = joined(
        [
            roll_out(policy, conditioning[rows], start[rows], noise[rows], policy.sigmas(NUM_STEPS), sampling_for())
            for rows in row_slices(NUM_IMAGES, ROLLOUT_BATCH)
        ]
    )
    advantages = torch.randn(NUM_IMAGES, NUM_STEPS, generator=generator)
    constant_N = torch.zeros(NUM_IMAGES, dtype=torch.bool)
    constant_N[list(constant)] = True
    advantages[constant_N] = 0
    return RolloutBatch(
        trajectory=trajectory, conditioning=conditioning, advantages_NK=advantages, constant_N=constant_N
    )


def weights(policy: Policy) -> torch.Tensor:
    """Joins all trained parameters to one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.adapter_parameters().values()])


def spoil_gradient(policy: Policy, value: float) -> None:
    """Lets one number of every gradient of one weight become `value`."""
    parameter = next(iter(policy.adapter_parameters().values()))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    parameter.register_hook(spoil)
