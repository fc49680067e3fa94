"""All prompts of the shapes world, in GenEval's grammar, and their split: training, validation, evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from sfgrpo.geneval.prompt_sets import VALIDATION_STREAM, PromptSpace, prompt_spaces, sample_prompts, twin_key
from sfgrpo.shapes.world import CLASSES, COLORS
from sfgrpo.types import Prompt, Tag


def all_prompts() -> dict[Tag, list[Prompt]]:
    """Return all prompts of every task: 6, 30, 18, 48, 120 and 1680."""
    spaces = prompt_spaces(CLASSES, COLORS)
    return {tag: [make(arguments) for arguments in candidates] for tag, (make, candidates) in spaces.items()}


def split_prompts(num_evaluation: dict[Tag, int], seed: int) -> tuple[dict[Tag, list[Prompt]], dict[Tag, list[Prompt]]]:
    """Split the prompt space into (other, evaluation) prompts of every task.

    Evaluation prompts are drawn without replacement; the others hold none of them nor the order-swapped twin of one.
    All of `single_object` may be evaluated on, since training needs none of it.

    Raises:
        ValueError: more evaluation prompts of a task are requested than it has.
    """
    generator = np.random.default_rng(seed)
    others: dict[Tag, list[Prompt]] = {}
    evaluation: dict[Tag, list[Prompt]] = {}
    for tag, prompts in all_prompts().items():
        if num_evaluation[tag] > len(prompts):
            raise ValueError(
                f"task {tag} has {len(prompts)} prompts, fewer than the {num_evaluation[tag]} for evaluation; lower it"
            )
        chosen = sorted(generator.choice(len(prompts), size=num_evaluation[tag], replace=False))
        evaluation[tag] = [prompts[index] for index in chosen]
        others[tag] = _without(evaluation[tag], prompts)
    return others, evaluation


def split_validation(
    prompts: Mapping[Tag, Sequence[Prompt]], num_validation: Mapping[Tag, int], seed: int
) -> tuple[dict[Tag, list[Prompt]], dict[Tag, list[Prompt]]]:
    """Split what is not evaluated on into (training, validation) prompts of every task.

    Requests are drawn without replacement, each with all its order-swapped twins before the next: twins may not be
    trained on anyway, and some tasks have few requests to spare. Evaluation prompts do not depend on this draw.

    Raises:
        ValueError: more validation prompts of a task are requested than are left of it.
    """
    generator = np.random.default_rng((seed, VALIDATION_STREAM))
    training: dict[Tag, list[Prompt]] = {}
    validation: dict[Tag, list[Prompt]] = {}
    for tag, left in prompts.items():
        if num_validation[tag] > len(left):
            raise ValueError(
                f"task {tag} has {len(left)} prompts that are not evaluated on, fewer than the {num_validation[tag]} "
                "for validation; lower it"
            )
        requests: dict[Hashable, list[Prompt]] = {}
        for prompt in left:
            requests.setdefault(twin_key(prompt), []).append(prompt)
        twins = list(requests.values())
        drawn = [prompt for index in generator.permutation(len(twins)) for prompt in twins[index]]
        validation[tag] = drawn[: num_validation[tag]]
        training[tag] = _without(validation[tag], left)
    return training, validation


def _without(held_out: Sequence[Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that ask for nothing that a held-out one asks for."""
    keys = set(map(twin_key, held_out))
    return [prompt for prompt in prompts if twin_key(prompt) not in keys]


def sample_training_prompts(
    training: dict[Tag, list[Prompt]], weights: dict[Tag, float], num_prompts: int, seed: int | tuple[int, int]
) -> list[Prompt]:
    """Draw a shuffled training set, tasks by `weights`, each prompt of a task once before any is drawn again."""
    spaces: dict[Tag, PromptSpace] = {tag: (lambda prompt: prompt, prompts) for tag, prompts in training.items()}
    return sample_prompts(spaces, (), num_prompts=num_prompts, weights=weights, seed=seed)
