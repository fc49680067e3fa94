"""Judges a policy on fixed prompts and fixed noise, by the deterministic sampler that people use and by any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.distributed import summed
from sfgrpo.geneval.table import GenEvalTable, summarise
from sfgrpo.policies.base import Policy
from sfgrpo.random import gaussian_noise
from sfgrpo.rewards.base import Reward, checked_rewards
from sfgrpo.rollout import roll_out, row_slices
from sfgrpo.types import Conditioning, Prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a policy drew for the evaluation prompts, and how good it is."""

    images: NDArray[np.uint8]
    """Of the prompts that are shown, [shown * G, H, W, 3], the images of a prompt next to each other."""
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
    rows: slice = slice(None),
    sampler: str = "ode",
    noise_level: float = 0.0,
) -> NDArray[np.uint8]:
    """Draws one image for each of `rows` of `conditioning`; row i takes noise i of the seed's streams."""
    sigmas, shape = policy.sigmas(num_steps).to(policy.device), policy.latent_shape
    first, end, _ = rows.indices(len(conditioning))
    images = []
    # With no row at all there is still one batch, an empty one: a sharded model needs every process in every pass.
    for part in row_slices(end - first, micro_batch_size) or [slice(0, 0)]:
        indices = range(first + part.start, first + part.stop)
        start = gaussian_noise(seed, "evaluation", 0, indices, shape)
        if sampler == "ode":
            step_noise = torch.zeros(()).expand(len(indices), num_steps, *shape)
        else:
            step_noise = gaussian_noise(seed, "evaluation_steps", 0, indices, (num_steps, *shape))
        trajectory = roll_out(
            policy,
            conditioning[slice(indices.start, indices.stop)],
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
    shown: Sequence[int] = (),
    accelerator: Accelerator | None = None,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Draws `images_per_prompt` images for every prompt and judges each by GenEval's verdict and by other rewards.

    `verdict` gives 1 for a correct image and 0 for any other. The noise depends on seed, prompt position and image
    alone, so that two policies are compared on the same noise. `shown` are the positions of the prompts whose images
    are kept. The processes of `accelerator` share the work, and all have the result; each calls `between` after each
    batch, all of them equally often.
    """
    scores_NJ, images = _judged(
        policy,
        prompts,
        (verdict, *rewards),
        images_per_prompt=images_per_prompt,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        micro_batch_size=micro_batch_size,
        shown=shown,
        accelerator=accelerator,
        between=between,
    )
    correct = scores_NJ[:, 0].numpy().reshape(len(prompts), images_per_prompt) == 1.0
    return Evaluation(
        images=images,
        correct=correct,
        table=summarise([prompt.tag for prompt in prompts], correct),
        rewards={reward.name: float(scores_NJ[:, 1 + index].mean()) for index, reward in enumerate(rewards)},
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
    accelerator: Accelerator | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Gives the mean of every reward over the images that a sampler draws, by the reward's name.

    With the sampler of the training it tells what training improves; the prompts, unlike those of an update, are
    the same every time, and so is the noise. Processes share the work as in `evaluate_policy`.
    """
    scores_NJ, _ = _judged(
        policy,
        prompts,
        rewards,
        images_per_prompt=images_per_prompt,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        micro_batch_size=micro_batch_size,
        shown=(),
        accelerator=accelerator,
        between=between,
        sampler=sampler,
        noise_level=noise_level,
    )
    return {reward.name: float(scores_NJ[:, index].mean()) for index, reward in enumerate(rewards)}


def _judged(
    policy: Policy,
    prompts: Sequence[Prompt],
    judges: Sequence[Reward],
    *,
    images_per_prompt: int,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    micro_batch_size: int,
    shown: Sequence[int],
    accelerator: Accelerator | None,
    between: Callable[[], None],
    sampler: str = "ode",
    noise_level: float = 0.0,
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Gives the score of every image by every judge, [P * G, J], and the images of the shown prompts."""
    process, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    conditioning = policy.encode([prompt.text for prompt in prompts])
    repeated = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
    asked = [prompts[position] for position in repeated.tolist()]
    shown_rows = [position * images_per_prompt + index for position in shown for index in range(images_per_prompt)]
    batches = row_slices(len(asked), micro_batch_size)
    # Batches are dealt out one by one; a process that runs short takes part with empty ones.
    batches += [slice(len(asked), len(asked))] * (-len(batches) % num_processes)
    scores_NJ = torch.zeros(len(asked), len(judges))
    kept = torch.empty(0)
    for rows in batches[process::num_processes]:
        images = draw_images(
            policy,
            conditioning[repeated],
            rows=rows,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            micro_batch_size=micro_batch_size,
            sampler=sampler,
            noise_level=noise_level,
        )
        if len(images):
            scores = [checked_rewards(judge, images, asked[rows]) for judge in judges]
            scores_NJ[rows] = torch.stack(scores, dim=1)
        if not len(kept):
            kept = torch.zeros(len(shown_rows), *images.shape[1:], dtype=torch.uint8)
        for place, row in enumerate(shown_rows):
            if rows.start <= row < rows.stop:
                kept[place] = torch.from_numpy(images[row - rows.start])
        between()
    if accelerator is not None:
        scores_NJ, kept = summed(scores_NJ, accelerator), summed(kept, accelerator)
    return scores_NJ, kept.numpy()
