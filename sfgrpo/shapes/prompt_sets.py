"""All prompts of the shapes world, in GenEval's grammar, and their split into training and evaluation prompts."""

from __future__ import annotations

import numpy as np

from sfgrpo.geneval.prompt_sets import PromptSpace, prompt_spaces, sample_prompts, twin_key
from sfgrpo.shapes.world import CLASSES, COLORS
from sfgrpo.types import Prompt, Tag


def all_prompts() -> dict[Tag, list[Prompt]]:
    """Return all prompts of every task: 6, 30, 18, 48, 120 and 1680."""
    spaces = prompt_spaces(CLASSES, COLORS)
    return {tag: [make(arguments) for arguments in candidates] for tag, (make, candidates) in spaces.items()}


def split_prompts(num_evaluation: dict[Tag, int], seed: int) -> tuple[dict[Tag, list[Prompt]], dict[Tag, list[Prompt]]]:
    """Split the prompt space into (training, evaluation) prompts of every task.

    Evaluation prompts are drawn without replacement; a training prompt is never an evaluation prompt nor the
    order-swapped twin of one. All of `single_object` may be evaluated on, since training needs none of it.

    Raises:
        ValueError: more evaluation prompts of a task are requested than it has.
    """
    generator = np.random.default_rng(seed)
    training: dict[Tag, list[Prompt]] = {}
    evaluation: dict[Tag, list[Prompt]] = {}
    for tag, prompts in all_prompts().items():
        if num_evaluation[tag] > len(prompts):
            raise ValueError(
                f"task {tag} has {len(prompts)} prompts, fewer than the {num_evaluation[tag]} for evaluation; lower it"
            )
        chosen = sorted(generator.choice(len(prompts), size=num_evaluation[tag], replace=False))
        evaluation[tag] = [prompts[index] for index in chosen]
        held_out = set(map(twin_key, evaluation[tag]))
        training[tag] = [prompt for prompt in prompts if twin_key(prompt) not in held_out]
    return training, evaluation


def sample_training_prompts(
    training: dict[Tag, list[Prompt]], weights: dict[Tag, float], num_prompts: int, seed: int | tuple[int, int]
) -> list[Prompt]:
    """Draw a shuffled training set, tasks by `weights`, each prompt of a task once before any is drawn again."""
    spaces: dict[Tag, PromptSpace] = {tag: (lambda prompt: prompt, prompts) for tag, prompts in training.items()}
    return sample_prompts(spaces, (), num_prompts=num_prompts, weights=weights, seed=seed)
