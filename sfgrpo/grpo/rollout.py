"""Runs the policy from noise to image along a schedule and keeps what training needs of every step."""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo.grpo.sde import SAMPLERS, gaussian_log_prob, sample_step
from sfgrpo.policies.base import Policy
from sfgrpo.types import Conditioning, Trajectory


@torch.no_grad()
def roll_out(
    policy: Policy,
    conditioning: Conditioning,
    start_noise_NCHW: Tensor,
    step_noise_NKCHW: Tensor,
    sigmas_S: Tensor,
    *,
    sampler: str,
    noise_level: float,
    guidance_scale: float,
    micro_batch_size: int,
) -> Trajectory:
    """Denoises N start states in K stochastic steps; step k takes state k to state k + 1.

    Noise comes in from outside, so that it depends on the image alone and not on batch or rank. No images at all
    still make one run of the policy, since processes that share a model need one another in every pass.
    """
    parts = [
        _roll_out_batch(
            policy,
            conditioning[rows],
            start_noise_NCHW[rows],
            step_noise_NKCHW[rows],
            sigmas_S,
            sampler,
            noise_level,
            guidance_scale,
        )
        for rows in row_slices(len(start_noise_NCHW), micro_batch_size) or [slice(0, 0)]
    ]
    return Trajectory(
        latents_NSCHW=torch.cat([part.latents_NSCHW for part in parts]),
        velocities_NKCHW=torch.cat([part.velocities_NKCHW for part in parts]),
        log_probs_NK=torch.cat([part.log_probs_NK for part in parts]),
    )


def row_slices(num_rows: int, micro_batch_size: int) -> list[slice]:
    """Cuts rows 0..num_rows into consecutive slices of at most `micro_batch_size`."""
    return [slice(start, min(start + micro_batch_size, num_rows)) for start in range(0, num_rows, micro_batch_size)]


def _roll_out_batch(
    policy: Policy,
    conditioning: Conditioning,
    start: Tensor,
    noise_NKCHW: Tensor,
    sigmas_S: Tensor,
    sampler: str,
    noise_level: float,
    guidance_scale: float,
) -> Trajectory:
    x = start.float()
    states, velocities, log_probs = [x], [], []
    for k in range(len(sigmas_S) - 1):
        sigma, sigma_next = sigmas_S[k].expand(len(x)), sigmas_S[k + 1].expand(len(x))
        velocity = policy.velocity(x, sigma, conditioning, guidance_scale)
        step = SAMPLERS[sampler](x, velocity, sigma, sigma_next, sigmas_S[1].item(), noise_level)
        x = sample_step(step, noise_NKCHW[:, k])
        stochastic = bool((step.std > 0).all())
        log_probs.append(
            gaussian_log_prob(x, step.mean, step.std) if stochastic else torch.full_like(sigma, float("nan"))
        )
        states.append(x)
        velocities.append(velocity)
    return Trajectory(
        latents_NSCHW=torch.stack(states, dim=1),
        velocities_NKCHW=torch.stack(velocities, dim=1),
        log_probs_NK=torch.stack(log_probs, dim=1),
    )
