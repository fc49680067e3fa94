"""Judges a policy on fixed prompts and fixed noise with the deterministic sampler that people use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sfgrpo.geneval.table import GenEvalTable, summarise
from sfgrpo.policies.base import Policy
from sfgrpo.random import gaussian_noise
from sfgrpo.rewards.base import Reward, checked_rewards
from sfgrpo.rollout import row_slices
from sfgrpo.types import Conditioning, Prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a policy drew for the evaluation prompts, and how good it is."""

    images: NDArray[np.uint8]  # [N, H, W, 3], the images of a prompt next to each other
    correct: NDArray[np.bool_]  # [P, G]
    table: GenEvalTable
    rewards: Mapping[str, float]
    """Mean of each reward."""

    def to_dict(self) -> dict[str, float]:
        """Flattens the table and the mean rewards to metrics."""
        return self.table.to_dict() | {f"evaluation/{name}": value for name, value in self.rewards.items()}


@torch.no_grad()
def draw_images(
    policy: Policy,
    conditioning: Conditioning,
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    micro_batch_size: int,
) -> NDArray[np.uint8]:
    """Draws one image per row of `conditioning` by Euler steps; row i starts from noise i of the seed's stream."""
    sigmas = policy.sigmas(num_steps).to(policy.device)
    images = []
    for rows in row_slices(len(conditioning), micro_batch_size):
        indices = range(rows.start, rows.stop)
        x = gaussian_noise(seed, "evaluation", 0, indices, policy.latent_shape).to(policy.device)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            velocity = policy.velocity(x, sigma.expand(len(x)), conditioning[rows], guidance_scale)
            x = x + (sigma_next - sigma) * velocity
        images.append(policy.decode(x))
    return np.concatenate(images)


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Prompt],
    verdict: Reward,
    rewards: Sequence[Reward],
    *,
    images_per_prompt: int,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    micro_batch_size: int,
) -> Evaluation:
    """Draws `images_per_prompt` images for every prompt and judges each by GenEval's verdict and by other rewards.

    `verdict` gives 1 for a correct image and 0 for any other. The noise depends on seed, prompt position and image
    alone, so that two policies are compared on the same noise.
    """
    conditioning = policy.encode([prompt.text for prompt in prompts])
    repeated = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
    asked = [prompts[row] for row in repeated.tolist()]
    images = draw_images(
        policy,
        conditioning[repeated],
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        micro_batch_size=micro_batch_size,
    )
    correct = checked_rewards(verdict, images, asked).numpy().reshape(len(prompts), images_per_prompt) == 1.0
    return Evaluation(
        images=images,
        correct=correct,
        table=summarise([prompt.tag for prompt in prompts], correct),
        rewards={reward.name: float(checked_rewards(reward, images, asked).mean()) for reward in rewards},
    )
