"""Captioned pictures of the shapes world: what the base model is trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import IMAGE_SIZE, render, sample_scene
from sfgrpo.types import TAGS, Prompt, Tag


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Rendered scenes with the prompt that each of them shows."""

    images: NDArray[np.uint8]  # [N, 32, 32, 3]
    prompts: tuple[Prompt, ...]
    prompt_index: NDArray[np.int64]  # [N], into `prompts`


def render_pictures(num_images: int, task_weights: dict[Tag, float], seed: int) -> Pictures:
    """Render `num_images` scenes; the task is drawn by weight, the prompt uniformly within its task."""
    generator = np.random.default_rng(seed)
    spaces = all_prompts()
    prompts = tuple(prompt for tag in TAGS for prompt in spaces[tag])
    sizes = [len(spaces[tag]) for tag in TAGS]
    first = np.cumsum([0, *sizes])
    weights = np.array([task_weights[tag] for tag in TAGS], dtype=np.float64)
    drawn = generator.choice(len(TAGS), size=num_images, p=weights / weights.sum())
    images = np.empty((num_images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    prompt_index = np.empty(num_images, dtype=np.int64)
    for index, task in enumerate(drawn):
        prompt_index[index] = first[task] + generator.integers(sizes[task])
        images[index] = render(sample_scene(prompts[prompt_index[index]], generator), generator)
    return Pictures(images=images, prompts=prompts, prompt_index=prompt_index)
