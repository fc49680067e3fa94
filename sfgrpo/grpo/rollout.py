"""The rollout: runs the policy from noise to image along a schedule and keeps what training needs of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sfgrpo.grpo.sde import SAMPLERS, gaussian_log_prob, sample_step
from sfgrpo.policies.base import Policy
from sfgrpo.types import Conditioning, SamplerName, Trajectory


class Sampling(Protocol):
    """How the policy samples: the section `sampling` of the parameters, or a protocol of an evaluation."""

    @property
    def sampler(self) -> SamplerName: ...
    @property
    def noise_level(self) -> float: ...
    @property
    def guidance_scale(self) -> float: ...


@torch.no_grad()
def roll_out(
    policy: Policy,
    conditioning: Conditioning,
    start_noise_NCHW: Tensor,
    step_noise_NKCHW: Tensor,
    sigmas_S: Tensor,
    sampling: Sampling,
    on_pass: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Denoise N start states together in K steps; step k takes state k to state k + 1. `on_pass` follows every step.

    Noise comes in from outside, so that it depends on the image alone and not on batch or rank. No images at all
    still make one run of the policy: processes that share a model need one another in every pass.
    """
    x = start_noise_NCHW.float()
    states, velocities, log_probs = [x], [], []
    for k in range(len(sigmas_S) - 1):
        sigma, sigma_next = sigmas_S[k].expand(len(x)), sigmas_S[k + 1].expand(len(x))
        velocity = policy.velocity(x, sigma, conditioning, sampling.guidance_scale)
        step = SAMPLERS[sampling.sampler](x, velocity, sigma, sigma_next, sigmas_S[1].item(), sampling.noise_level)
        x = sample_step(step, step_noise_NKCHW[:, k])
        stochastic = bool((step.std > 0).all())
        log_probs.append(gaussian_log_prob(x, step.mean, step.std) if stochastic else torch.full_like(sigma, torch.nan))
        states.append(x)
        velocities.append(velocity)
        on_pass()
    return Trajectory(
        latents_NSCHW=torch.stack(states, dim=1),
        velocities_NKCHW=torch.stack(velocities, dim=1),
        log_probs_NK=torch.stack(log_probs, dim=1),
    )
