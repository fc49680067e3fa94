"""GenEval's decision rules: from the detections of any detector to the official verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sfgrpo.geneval.relations import relations_between
from sfgrpo.types import Clause, Detection, Prompt, Relation, Tag

THRESHOLD = 0.3
"""A detection's score must exceed it, in float32."""
COUNTING_THRESHOLD = 0.9
"""The same, for every class of a counting prompt."""
MAX_OBJECTS = 16
"""Most confident detections kept of a class."""


def filter_detections(detections: Iterable[Detection], tag: Tag) -> dict[str, list[Detection]]:
    """Group the detections that count by class, most confident first; of equal scores the later one leads.

    Scores are compared in float32, as GenEval does: a detector's float32 score of 0.3 does not exceed 0.3.
    """
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    groups: dict[str, list[Detection]] = {}
    for detection in detections:
        if np.float32(detection.score) > threshold:
            groups.setdefault(detection.class_name, []).append(detection)
    return {
        class_name: sorted(found, key=lambda detection: np.float32(detection.score))[::-1][:MAX_OBJECTS]
        for class_name, found in groups.items()
    }


def count_seen(prompt: Prompt, detections: Iterable[Detection]) -> int:
    """Return how many objects of the first clause's class count, `MAX_OBJECTS` at most; extra ones included."""
    return len(filter_detections(detections, prompt.tag).get(prompt.include[0].class_name, ()))


def is_correct(prompt: Prompt, detections: Iterable[Detection]) -> bool:
    """Judge as GenEval's evaluate_images.py: at least the objects asked for, and none of the excluded counts.

    Of each include clause the `count` most confident detections are looked at: all must have the clause's colour, and
    all must stand in its relation to all of the target clause's. Other classes and further instances never matter,
    except where an exclude clause forbids them.
    """
    groups = filter_detections(detections, prompt.tag)
    tops: list[Sequence[Detection] | None] = []
    for clause in prompt.include:
        top = groups.get(clause.class_name, ())[: clause.count]
        tops.append(top if len(top) == clause.count and fulfils(clause, top, tops) else None)
    excluded = any(len(groups.get(clause.class_name, ())) >= clause.count for clause in prompt.exclude)
    return None not in tops and not excluded


def asks_for_a_number(prompt: Prompt) -> bool:
    """Return whether a prompt forbids one object more than it asks for, so that a correct image has an exact number."""
    limits = {(clause.class_name, clause.count) for clause in prompt.exclude}
    return any((clause.class_name, clause.count + 1) in limits for clause in prompt.include)


def count_all(prompt: Prompt, detections: Iterable[Detection]) -> int:
    """Return how many objects of all classes count for a prompt."""
    return sum(map(len, filter_detections(detections, prompt.tag).values()))


def fulfils(clause: Clause, found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]) -> bool:
    """Return whether `found` has the clause's colour and is in its relation to the earlier clause's match."""
    if not has_color(clause, found):
        return False
    if clause.position is None:
        return True
    target = matched[clause.position[1]]
    return target is not None and in_relation(found, target, clause.position[0])


def has_color(clause: Clause, found: Sequence[Detection]) -> bool:
    """Return whether all of `found` have the colour that the clause names, if it names one."""
    return clause.color is None or all(detection.color == clause.color for detection in found)


def in_relation(found: Sequence[Detection], target: Sequence[Detection], relation: Relation) -> bool:
    """Return whether every pair of a found object and a target object is in the relation."""
    return all(relation in relations_between(one.box, other.box) for one in found for other in target)
