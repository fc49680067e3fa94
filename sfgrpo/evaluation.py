"""Judges a policy on fixed prompts and fixed noise, by the deterministic sampler that people use and by any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sfgrpo.geneval.table import GenEvalTable, summarise
from sfgrpo.policies.base import Policy
from sfgrpo.random import gaussian_noise
from sfgrpo.rewards.base import Reward, checked_rewards
from sfgrpo.rollout import roll_out, row_slices
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
    sampler: str = "ode",
    noise_level: float = 0.0,
) -> NDArray[np.uint8]:
    """Draws one image per row of `conditioning`; row i takes noise i of the seed's streams, whatever the policy."""
    sigmas, shape = policy.sigmas(num_steps).to(policy.device), policy.latent_shape
    images = []
    for rows in row_slices(len(conditioning), micro_batch_size):
        indices = range(rows.start, rows.stop)
        start = gaussian_noise(seed, "evaluation", 0, indices, shape)
        if sampler == "ode":
            step_noise = torch.zeros(()).expand(len(indices), num_steps, *shape)
        else:
            step_noise = gaussian_noise(seed, "evaluation_steps", 0, indices, (num_steps, *shape))
        trajectory = roll_out(
            policy,
            conditioning[rows],
            start.to(policy.device),
            step_noise.to(policy.device),
            sigmas,
            sampler=sampler,
            noise_level=noise_level,
            guidance_scale=guidance_scale,
            micro_batch_size=micro_batch_size,
        )
        images.append(policy.decode(trajectory.latents_NSCHW[:, -1]))
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


def mean_rewards(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    images_per_prompt: int,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    micro_batch_size: int,
    sampler: str,
    noise_level: float,
) -> dict[str, float]:
    """Gives the mean of every reward over the images that a sampler draws, by the reward's name.

    With the sampler of the training it tells what training improves; the prompts, unlike those of an update, are
    the same every time, and so is the noise.
    """
    asked = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    conditioning = policy.encode([prompt.text for prompt in prompts])
    images = draw_images(
        policy,
        conditioning[torch.arange(len(prompts)).repeat_interleave(images_per_prompt)],
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        micro_batch_size=micro_batch_size,
        sampler=sampler,
        noise_level=noise_level,
    )
    return {reward.name: float(checked_rewards(reward, images, asked).mean()) for reward in rewards}
