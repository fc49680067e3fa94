"""Evaluation of a policy on fixed prompts and noise, with the deterministic sampler or any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.geneval.table import GenEvalTable, summarise
from sfgrpo.grpo.distributed import row_slices, summed
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.policies.base import Policy
from sfgrpo.rewards import Reward, build_reward, checked_rewards, confirmation_of
from sfgrpo.tracking.sample_grid import Samples
from sfgrpo.types import Conditioning, Prompt, SamplerName

if TYPE_CHECKING:
    from sfgrpo.config.schema import EvaluationConfig

THUMBNAIL_SIZE = 32
"""Height and width of a thumbnail at most, in pixels."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingProtocol:
    """How images are sampled for an evaluation; under one protocol all policies get the same noise, image by image."""

    images_per_prompt: int
    num_steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance weight; 1 disables it."""
    seed: int
    """Seed of all noise."""
    micro_batch_size: int
    """Images that are denoised together; it changes nothing but rounding."""
    sampler: SamplerName = "ode"
    noise_level: float = 0.0
    """Noise eta of a stochastic sampler."""


def protocol_of(config: EvaluationConfig) -> SamplingProtocol:
    """Return the protocol of the section `evaluation`, which uses the deterministic sampler."""
    return SamplingProtocol(
        images_per_prompt=config.images_per_prompt,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The images of a policy for the evaluation prompts, and their scores."""

    images: NDArray[np.uint8]
    """Images of the prompts that are shown, [shown * G, H, W, 3], those of a prompt next to each other."""
    seen: Sequence[int | None]
    """Of `Reward.seen`, for each of `images`."""
    thumbnails_PGHWC: NDArray[np.uint8]
    """All images, shrunk to thumbnails."""
    correct: NDArray[np.bool_]  # [P, G]
    table: GenEvalTable
    rewards_PG: Mapping[str, NDArray[np.floating[Any]]]
    """Score of every image, by the name of the reward."""
    agreement: Agreement | None = None
    """With an independent counter; None where the detector's world has none."""

    @property
    def samples(self) -> Samples:
        """What a grid shows of the model."""
        return Samples(images=self.images, correct=self.correct, seen=self.seen)

    @property
    def rewards(self) -> Mapping[str, float]:
        """The mean of each reward."""
        return {name: _mean(values_PG) for name, values_PG in self.rewards_PG.items()}

    def to_dict(self) -> dict[str, float]:
        """Return the table, the agreement and the mean rewards as metrics."""
        agreement = {} if self.agreement is None else self.agreement.to_dict()
        rewards = {f"evaluation/{name}": value for name, value in self.rewards.items()}
        return self.table.to_dict() | agreement | rewards


def draw_images(policy: Policy, conditioning: Conditioning, protocol: SamplingProtocol) -> NDArray[np.uint8]:
    """Draw one image for each row of `conditioning`; row i takes noise i of the seed's streams."""
    batches = row_slices(len(conditioning), protocol.micro_batch_size)
    return np.concatenate([_draw_batch(policy, conditioning, protocol, rows) for rows in batches])


@torch.no_grad()
def _draw_batch(
    policy: Policy,
    conditioning: Conditioning,
    protocol: SamplingProtocol,
    rows: slice,
    on_pass: Callable[[], None] = lambda: None,
) -> NDArray[np.uint8]:
    """Draw the images of `rows` together; of no row at all the policy still runs once."""
    indices = range(rows.start, rows.stop)
    start = gaussian_noise(protocol.seed, "evaluation", 0, indices, policy.latent_shape)
    step_shape = (protocol.num_steps, *policy.latent_shape)
    if protocol.sampler == "ode":
        step_noise = torch.zeros(()).expand(len(indices), *step_shape)
    else:
        step_noise = gaussian_noise(protocol.seed, "evaluation_steps", 0, indices, step_shape)
    trajectory = roll_out(
        policy,
        conditioning[rows],
        start.to(policy.device),
        step_noise.to(policy.device),
        policy.sigmas(protocol.num_steps).to(policy.device),
        protocol,
        on_pass,
    )
    return policy.decode(trajectory.latents_NSCHW[:, -1])


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    protocol: SamplingProtocol,
    *,
    is_correct: Reward | None = None,
    shown: Sequence[int] = (),
    accelerator: Accelerator | None = None,
    on_pass: Callable[[], None] = lambda: None,
    on_images: Callable[[int, NDArray[np.uint8]], None] = lambda first, images: None,
) -> Evaluation:
    """Sample the protocol's images for every prompt and score each.

    The noise depends on seed, prompt position and image alone, so that two policies are compared on the same noise.
    The processes of `accelerator` share the work, and all have the result.

    Args:
        policy: Evaluated as it is.
        prompts: Positions 0..P.
        rewards: Scores to report beside GenEval's.
        protocol: How to sample.
        is_correct: Returns 1 for a correct image and 0 for any other, and counts what is shown; by default GenEval's
            own verdict. Where there is a counter that can confirm it, `confirmation_of`, the agreement is measured too.
        shown: Positions of the prompts whose images are kept.
        accelerator: The processes of the run; by default this one alone.
        on_pass: Called by each process after each pass of the policy and each batch, by all of them equally often.
        on_images: Gets the images of every batch, [n, H, W, 3], with the number of the first: image g of prompt p has
            number p * G + g, and those of a process come in ascending order.
    """
    verdict = is_correct or build_reward("geneval_correct")
    confirmation = confirmation_of(verdict.name)
    judges = (verdict, *rewards, *([] if confirmation is None else [confirmation]))
    scores_NJ, images, small_NHWC = _score_images(
        policy, prompts, judges, protocol, shown, accelerator, on_pass, on_images
    )
    shape = len(prompts), protocol.images_per_prompt
    scores_JPG = scores_NJ.numpy().T.reshape(-1, *shape)
    correct = scores_JPG[0] == 1.0
    return Evaluation(
        images=images.numpy(),
        seen=verdict.seen(images.numpy(), [prompts[row] for row in shown for _ in range(protocol.images_per_prompt)]),
        thumbnails_PGHWC=small_NHWC.numpy().reshape(*shape, *small_NHWC.shape[1:]),
        correct=correct,
        table=summarise([prompt.tag for prompt in prompts], correct),
        rewards_PG={reward.name: scores_JPG[1 + index] for index, reward in enumerate(rewards)},
        agreement=None if confirmation is None else Agreement.of(prompts, correct, scores_JPG[-1] == 1.0),
    )


def mean_rewards(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    protocol: SamplingProtocol,
    accelerator: Accelerator | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the mean of every reward over the images that the protocol's sampler makes, by the reward's name.

    With the sampler of the training this measures what training improves, on prompts and noise that, unlike those of
    an update, never change. Processes share the work as in `evaluate_policy`.
    """
    scores_NJ, _, _ = _score_images(policy, prompts, rewards, protocol, (), accelerator, on_pass)
    return {reward.name: _mean(scores_N) for reward, scores_N in zip(rewards, scores_NJ.numpy().T, strict=True)}


def thumbnails(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink images by averaging areas until both sides are within `THUMBNAIL_SIZE`; smaller ones stay."""
    sides = images_NHWC.shape[1:3]
    if max(sides) <= THUMBNAIL_SIZE:
        return images_NHWC
    size = [max(1, round(side * THUMBNAIL_SIZE / max(sides))) for side in sides]
    pixels_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
    averaged_NCHW = F.interpolate(pixels_NCHW, size, mode="area")
    return averaged_NCHW.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _score_images(
    policy: Policy,
    prompts: Sequence[Prompt],
    judges: Sequence[Reward],
    protocol: SamplingProtocol,
    shown: Sequence[int],
    accelerator: Accelerator | None,
    on_pass: Callable[[], None],
    on_images: Callable[[int, NDArray[np.uint8]], None] = lambda first, images: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the N = P * G images of all prompts, each process its part.

    Return the score of every image by every judge, the images of the shown prompts, and all images as thumbnails.
    """
    process, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    conditioning, num_images = policy.encode([prompt.text for prompt in prompts]), protocol.images_per_prompt
    positions = torch.arange(len(prompts)).repeat_interleave(num_images)
    prompts_N = [prompts[position] for position in positions.tolist()]
    shown_rows = [position * num_images + index for position in shown for index in range(num_images)]
    batches = row_slices(len(prompts_N), protocol.micro_batch_size)
    # Batches are dealt out one by one; a process that runs short takes part with empty ones.
    batches += [slice(len(prompts_N), len(prompts_N))] * (-len(batches) % num_processes)
    scores_NJ = torch.zeros(len(prompts_N), len(judges))
    kept = small_NHWC = torch.empty(0, dtype=torch.uint8)
    for rows in batches[process::num_processes]:
        images = _draw_batch(policy, conditioning[positions], protocol, rows, on_pass)
        small = thumbnails(images)
        if not len(small_NHWC):
            kept = torch.zeros(len(shown_rows), *images.shape[1:], dtype=torch.uint8)
            small_NHWC = torch.zeros(len(prompts_N), *small.shape[1:], dtype=torch.uint8)
        if len(images):
            scores = [checked_rewards(judge, images, prompts_N[rows]) for judge in judges]
            scores_NJ[rows] = torch.stack(scores, dim=1)
            small_NHWC[rows] = torch.from_numpy(small)
            on_images(rows.start, images)
        for place, row in enumerate(shown_rows):
            if rows.start <= row < rows.stop:
                kept[place] = torch.from_numpy(images[row - rows.start])
        on_pass()
    if accelerator is not None:
        # Each process has zeros where the others have numbers.
        scores_NJ, kept = summed(scores_NJ, accelerator), summed(kept, accelerator)
        small_NHWC = summed(small_NHWC, accelerator)
    return scores_NJ, kept, small_NHWC


def _mean(values: NDArray[np.floating[Any]]) -> float:
    return float(torch.from_numpy(values).flatten().mean())
