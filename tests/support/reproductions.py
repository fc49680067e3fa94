"""GenEval's prompt files and Flow-GRPO's scores made anew, to compare with the published files and golden vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.geneval.prompt_sets import COLORLESS_CLASS, COLORS, COUNTS
from sfgrpo.geneval.scorer import filter_detections, fulfils, has_color, in_relation
from sfgrpo.types import RELATIONS, Detection, Prompt, Tag

FLOW_GRPO_WEIGHTS: dict[Tag, float] = {
    "single_object": 0.0,
    "two_object": 1.0,
    "counting": 5.0,
    "colors": 1.0,
    "position": 7.0,
    "color_attr": 3.0,
}
"""Ratio of the tasks in Flow-GRPO's training set (arXiv:2505.05470)."""
NUM_FLOW_GRPO_PROMPTS = 50_000

_T = TypeVar("_T")


def evaluation_prompts(class_names: Sequence[str], *, seed: int = 43, num_draws: int = 100) -> list[Prompt]:
    """Make the evaluation prompts as GenEval's create_prompts.py does, draw for draw.

    With the defaults and the 80 published class names these are the 553 prompts of evaluation_metadata.jsonl:
    `num_draws` draws of every task but single_object, which has every class once; of equal prompts the first stays.
    """
    generator = np.random.default_rng(seed)
    num_classes, person = len(class_names), class_names.index(COLORLESS_CLASS)
    colorable = [class_names[(person + 1 + index) % num_classes] for index in range(num_classes - 1)]

    def one(names: Sequence[_T]) -> _T:
        return names[generator.choice(len(names))]

    def several(names: Sequence[_T], size: int) -> list[_T]:
        return [names[index] for index in generator.choice(len(names), size=size, replace=False)]

    def count() -> int:
        return int(generator.integers(COUNTS[0], COUNTS[-1], endpoint=True))

    # Each draw's arguments are evaluated in the published order: classes, then count, colour or relation.
    prompts = [single_object(name) for name in several(class_names, num_classes)]
    prompts += [two_object(*several(class_names, 2)) for _ in range(num_draws)]
    prompts += [counting(one(class_names), count()) for _ in range(num_draws)]
    prompts += [colors(one(colorable), one(COLORS)) for _ in range(num_draws)]
    for _ in range(num_draws):
        name, target = several(class_names, 2)
        prompts.append(position(name, target, one(RELATIONS)))
    prompts += [color_attr(*several(colorable, 2), *several(COLORS, 2)) for _ in range(num_draws)]
    return list(dict.fromkeys(prompts))


def is_strict(prompt: Prompt, detections: Iterable[Detection]) -> bool:
    """Judge as Flow-GRPO's strict metric: exactly the counts asked for; all have the colour, all pairs the relation.

    Exclude clauses are not looked at: an exact count implies them.
    """
    groups = filter_detections(detections, prompt.tag)
    matched: list[Sequence[Detection] | None] = []
    for clause in prompt.include:
        found = groups.get(clause.class_name, ())
        matched.append(found if len(found) == clause.count and fulfils(clause, found, matched) else None)
    return None not in matched


def partial_credit(prompt: Prompt, detections: Iterable[Detection]) -> float:
    """Score as Flow-GRPO's reward server, bugs included: the mean of all clauses' parts, in (-inf, 1].

    A clause's parts are 1 - |count - found| / count, which is not clamped, and, where it names a colour or a relation:
    0 if the count is wrong; else 1 - |count - found of the colour| / count for the colour; and for the relation, if
    the colour is right, 0 without a matched target, 1 if all pairs hold, and both 0 and 1 if one does not.
    """
    groups = filter_detections(detections, prompt.tag)
    matched: list[Sequence[Detection] | None] = []
    parts: list[float] = []
    for clause in prompt.include:
        found = groups.get(clause.class_name, ())
        parts.append(1.0 - abs(clause.count - len(found)) / clause.count)
        if len(found) != clause.count:
            if clause.color is not None or clause.position is not None:
                parts.append(0.0)
            matched.append(None)
            continue
        if clause.color is not None:
            parts.append(sum(detection.color == clause.color for detection in found) / clause.count)
        if clause.position is not None and has_color(clause, found):
            target = matched[clause.position[1]]
            if target is None:
                parts.append(0.0)
            else:
                parts += [1.0] if in_relation(found, target, clause.position[0]) else [0.0, 1.0]
        matched.append(found if fulfils(clause, found, matched) else None)
    return sum(parts) / len(parts)
