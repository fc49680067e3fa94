"""Training prompts of GenEval's tasks that share nothing with its evaluation prompts.

A prompt space is a list of grammar arguments, so that the largest, half a million two-colour prompts, is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, permutations, product
from typing import Any

import numpy as np

from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.types import RELATIONS, TAGS, Prompt, Tag

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's colours, in the order of its classifier."""
COUNTS = (2, 3, 4)
COLORLESS_CLASS = "person"
"""The one class that no prompt gives a colour."""

VALIDATION_STREAM = 2**31
"""Second number of the seed of validation prompts; that of training prompts is an edition, which is always smaller."""

PromptSpace = tuple[Callable[[Any], Prompt], Sequence[Any]]
"""A function that makes a prompt, and all arguments that it can take."""


def twin_key(prompt: Prompt) -> Hashable:
    """Return what a prompt asks for: a key that is shared by all prompts of the same objects, colours and relations.

    "a A and a B" shares it with "a B and a A" and with any other wording of that. "a A left of a B" and "a B right of a
    A" have keys of their own, although the same images show both: the word for the relation is what a policy has to
    learn, and GenEval counts the two as two prompts (its own 553 hold one such pair).
    """
    return frozenset(
        (
            clause.class_name,
            clause.count,
            clause.color,
            None if clause.position is None else (clause.position[0], prompt.include[clause.position[1]].class_name),
        )
        for clause in prompt.include
    )


def training_prompts(
    class_names: Sequence[str],
    held_out: Iterable[Prompt],
    *,
    num_prompts: int,
    weights: Mapping[Tag, float],
    seed: int | tuple[int, int],
) -> list[Prompt]:
    """Draw a training set in Flow-GRPO's manner, shuffled: tasks by `weights`, nothing from `held_out` nor its twins.

    Differs: Flow-GRPO fills a task that is too small by drawing with replacement; here each of its prompts is drawn
    once before any is drawn again.
    """
    spaces = prompt_spaces(class_names, COLORS)
    return sample_prompts(spaces, set(map(twin_key, held_out)), num_prompts=num_prompts, weights=weights, seed=seed)


def validation_prompts(
    class_names: Sequence[str], held_out: Iterable[Prompt], *, num_prompts: Mapping[Tag, int], seed: int
) -> list[Prompt]:
    """Draw validation prompts by the grammar of the training prompts, task by task, without replacement.

    Each asks for something of its own, which no prompt of `held_out` asks for.

    Raises:
        ValueError: more prompts of a task are requested than are left of it.
    """
    generator = np.random.default_rng((seed, VALIDATION_STREAM))
    taken = set(map(twin_key, held_out))
    drawn: list[Prompt] = []
    for tag, (make, candidates) in prompt_spaces(class_names, COLORS).items():
        shuffled = (make(candidates[index]) for index in generator.permutation(len(candidates)))
        of_task = list(islice(_new_requests(shuffled, taken), num_prompts[tag]))
        if len(of_task) < num_prompts[tag]:
            raise ValueError(
                f"task {tag} has {len(of_task)} prompts that are not evaluated on, fewer than the {num_prompts[tag]} "
                "for validation; lower it"
            )
        drawn += of_task
    return drawn


def _new_requests(prompts: Iterable[Prompt], taken: set[Hashable]) -> Iterator[Prompt]:
    """Yield the prompts that ask for nothing that is taken, and take what they ask for."""
    for prompt in prompts:
        if (key := twin_key(prompt)) not in taken:
            taken.add(key)
            yield prompt


def sample_prompts(
    spaces: Mapping[Tag, PromptSpace],
    held_out_keys: Container[Hashable],
    *,
    num_prompts: int,
    weights: Mapping[Tag, float],
    seed: int | tuple[int, int],
) -> list[Prompt]:
    """Draw a shuffled list of prompts with the tasks in the ratio of `weights`, rounded by largest remainder.

    Raises:
        ValueError: all prompts of a task that has a weight are held out.
    """
    generator = np.random.default_rng(seed)
    drawn: list[Prompt] = []
    for tag, share in largest_remainder(weights, num_prompts).items():
        drawn += islice(_endless_draws(tag, spaces[tag], held_out_keys, generator), share)
    return [drawn[index] for index in generator.permutation(len(drawn))]


def largest_remainder(weights: Mapping[Tag, float], total: int) -> dict[Tag, int]:
    """Split `total` among the tasks by weight; the rest after rounding down goes to the largest remainders."""
    exact = {tag: total * weights[tag] / sum(weights.values()) for tag in TAGS}
    shares = {tag: int(exact[tag]) for tag in TAGS}
    for tag in sorted(TAGS, key=lambda tag: shares[tag] - exact[tag])[: total - sum(shares.values())]:
        shares[tag] += 1
    return shares


def _endless_draws(
    tag: Tag, space: PromptSpace, held_out_keys: Container[Hashable], generator: np.random.Generator
) -> Iterator[Prompt]:
    """Yield prompts without replacement in random order, then in another order, and so on; skip held-out twins."""
    make, candidates = space
    while True:
        left = False
        for index in generator.permutation(len(candidates)):
            prompt = make(candidates[index])
            if twin_key(prompt) not in held_out_keys:
                left = True
                yield prompt
        if not left:
            raise ValueError(
                f"all prompts of task {tag} are held out for evaluation or validation; set its training weight to 0, "
                "or hold out fewer"
            )


def prompt_spaces(class_names: Sequence[str], color_names: Sequence[str]) -> dict[Tag, PromptSpace]:
    """Return every task's grammar function with all arguments it can take."""
    colorable = [name for name in class_names if name != COLORLESS_CLASS]
    pairs, colorable_pairs = list(permutations(class_names, 2)), permutations(colorable, 2)
    color_pairs = permutations(color_names, 2)
    return {
        "single_object": (single_object, list(class_names)),
        "two_object": (lambda pair: two_object(*pair), pairs),
        "counting": (lambda item: counting(*item), list(product(class_names, COUNTS))),
        "colors": (lambda item: colors(*item), list(product(colorable, color_names))),
        "position": (lambda item: position(item[0][0], item[0][1], item[1]), list(product(pairs, RELATIONS))),
        "color_attr": (lambda item: color_attr(*item[0], *item[1]), list(product(colorable_pairs, color_pairs))),
    }
