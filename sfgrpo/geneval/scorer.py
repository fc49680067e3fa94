"""GenEval's decision rules: from the detections of any detector to a verdict, a strict verdict and a partial credit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sfgrpo.geneval.relations import relations_between
from sfgrpo.types import Box, Clause, Detection, Prompt, Relation, Tag


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DetectionFilter:
    """Which detections count; the defaults are GenEval's published ones."""

    threshold: float = 0.3
    """A score must exceed it, in float32."""
    counting_threshold: float = 0.9
    """The same, for every class of a counting prompt."""
    max_objects: int = 16
    """Most confident detections kept of a class."""
    max_overlap: float = 1.0
    """Intersection over union at which the less confident of two boxes of a class is dropped; 1 keeps both."""


OFFICIAL = DetectionFilter()


def filter_detections(
    detections: Iterable[Detection], tag: Tag, options: DetectionFilter = OFFICIAL
) -> dict[str, list[Detection]]:
    """Groups the detections that count by class, most confident first; of equal scores the later one leads.

    Scores are compared in float32, as GenEval does: a detector's float32 score of 0.3 does not exceed 0.3.
    """
    threshold = np.float32(options.counting_threshold if tag == "counting" else options.threshold)
    groups: dict[str, list[Detection]] = {}
    for detection in detections:
        if np.float32(detection.score) > threshold:
            groups.setdefault(detection.class_name, []).append(detection)
    for class_name, found in groups.items():
        ordered = sorted(found, key=lambda detection: np.float32(detection.score))[::-1][: options.max_objects]
        groups[class_name] = ordered if options.max_overlap >= 1.0 else _without_overlaps(ordered, options.max_overlap)
    return groups


def is_correct(prompt: Prompt, detections: Iterable[Detection], options: DetectionFilter = OFFICIAL) -> bool:
    """Judges as GenEval's evaluate_images.py: at least the objects asked for, and none of the excluded counts.

    Of each include clause the `count` most confident detections are looked at: all must have the clause's colour, and
    all must stand in its relation to all of the target clause's. Other classes and further instances never matter,
    except where an exclude clause forbids them.
    """
    groups = filter_detections(detections, prompt.tag, options)
    tops: list[Sequence[Detection] | None] = []
    for clause in prompt.include:
        top = groups.get(clause.class_name, ())[: clause.count]
        tops.append(top if len(top) == clause.count and _fulfils(clause, top, tops) else None)
    excluded = any(len(groups.get(clause.class_name, ())) >= clause.count for clause in prompt.exclude)
    return None not in tops and not excluded


def is_strict(prompt: Prompt, detections: Iterable[Detection], options: DetectionFilter = OFFICIAL) -> bool:
    """Judges as Flow-GRPO's strict metric: exactly the counts asked for; all have the colour, all pairs the relation.

    Exclude clauses are not looked at: an exact count implies them.
    """
    groups = filter_detections(detections, prompt.tag, options)
    matched: list[Sequence[Detection] | None] = []
    for clause in prompt.include:
        found = groups.get(clause.class_name, ())
        matched.append(found if len(found) == clause.count and _fulfils(clause, found, matched) else None)
    return None not in matched


def partial_credit(prompt: Prompt, detections: Iterable[Detection], options: DetectionFilter = OFFICIAL) -> float:
    """Scores as Flow-GRPO's reward server, bugs included: the mean of all clauses' parts, in (-inf, 1].

    A clause's parts are 1 - |count - found| / count, which is not clamped, and, where it names a colour or a relation:
    0 if the count is wrong; else 1 - |count - found of the colour| / count for the colour; and for the relation, if
    the colour is right, 0 without a matched target, 1 if all pairs hold, and both 0 and 1 if one does not.
    """
    groups = filter_detections(detections, prompt.tag, options)
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
        if clause.position is not None and _has_color(clause, found):
            target = matched[clause.position[1]]
            if target is None:
                parts.append(0.0)
            else:
                parts += [1.0] if _in_relation(found, target, clause.position[0]) else [0.0, 1.0]
        matched.append(found if _fulfils(clause, found, matched) else None)
    return sum(parts) / len(parts)


def _fulfils(clause: Clause, found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]) -> bool:
    """Whether `found` has the clause's colour and stands in its relation to the earlier clause's match."""
    if not _has_color(clause, found):
        return False
    if clause.position is None:
        return True
    target = matched[clause.position[1]]
    return target is not None and _in_relation(found, target, clause.position[0])


def _has_color(clause: Clause, found: Sequence[Detection]) -> bool:
    return clause.color is None or all(detection.color == clause.color for detection in found)


def _in_relation(found: Sequence[Detection], target: Sequence[Detection], relation: Relation) -> bool:
    return all(relation in relations_between(one.box, other.box) for one in found for other in target)


def _without_overlaps(ordered: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Greedy non-maximum suppression, most confident first."""
    kept: list[Detection] = []
    for detection in ordered:
        if all(intersection_over_union(detection.box, other.box) < max_overlap for other in kept):
            kept.append(detection)
    return kept


def intersection_over_union(first: Box, second: Box) -> float:
    """Overlap of two boxes under GenEval's convention that a box from x to x spans one pixel."""
    width = max(min(first[2], second[2]) - max(first[0], second[0]) + 1.0, 0.0)
    height = max(min(first[3], second[3]) - max(first[1], second[1]) + 1.0, 0.0)
    area, other_area = ((box[2] - box[0] + 1.0) * (box[3] - box[1] + 1.0) for box in (first, second))
    return width * height / (area + other_area - width * height)
