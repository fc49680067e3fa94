"""How far detections agree with what a person saw: matching by distance, shares and confusion table."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmarks.labels import DOUBTFUL, SMEAR, LabelledImage, LabelledObject
from sfgrpo.shapes.world import CLASSES
from sfgrpo.types import Box, Detection

MISSED, NOTHING, NAMED = "missed", "nothing", "named"
MAX_DISTANCE = 5.0
"""Pixels between the centres of a label and of the detection that may be its own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a person and a detector say of one image."""

    pairs: Sequence[tuple[LabelledObject, Detection]]
    missed: Sequence[LabelledObject]
    """Without a detection; smears among them."""
    extra: Sequence[Detection]
    """Without a label."""

    @property
    def labels(self) -> list[LabelledObject]:
        """All labels of the image."""
        return [label for label, _ in self.pairs] + list(self.missed)

    @property
    def detections(self) -> list[Detection]:
        """All detections of the image."""
        return [detection for _, detection in self.pairs] + list(self.extra)


def match_all(labelled: Sequence[LabelledImage], found: Sequence[Sequence[Detection]], threshold: float) -> list[Match]:
    """Match the labels of every image with its detections above a threshold, which is compared in float32."""
    limit = np.float32(threshold)
    return [
        match(image.objects, [each for each in detections if np.float32(each.score) > limit])
        for image, detections in zip(labelled, found, strict=True)
    ]


def match(labels: Sequence[LabelledObject], detections: Sequence[Detection]) -> Match:
    """Pair labels and detections, the closest first, none farther apart than `MAX_DISTANCE`; each is used once.

    Of pairs equally far apart that of the earlier detection comes first, which is the more confident one.
    """
    candidates = sorted(
        (distance, place, index)
        for place, detection in enumerate(detections)
        for index, label in enumerate(labels)
        if (distance := centre_distance(label, detection.box)) <= MAX_DISTANCE
    )
    detection_of: dict[int, int] = {}
    for _, place, index in candidates:
        if index not in detection_of and place not in detection_of.values():
            detection_of[index] = place
    return Match(
        pairs=[(labels[index], detections[place]) for index, place in sorted(detection_of.items())],
        missed=[label for index, label in enumerate(labels) if index not in detection_of],
        extra=[each for place, each in enumerate(detections) if place not in detection_of.values()],
    )


def agreement(matches: Sequence[Match]) -> dict[str, float | int | None]:
    """Return shares over all images; None where there is nothing to take a share of.

    `counted` is the share of the objects with a class beyond doubt that have a detection of any class,
    `counted_as_class` that of those with one of their own, `class_agrees` and `color_agrees` are shares of the counted
    ones. `smears_counted` and `doubtful_counted` are those of the other things with a detection, and
    `doubtful_agrees` is the share of the counted doubtful ones whose detected class is one that people allow.
    `extra` is the number of detections where a person sees nothing.
    """
    pairs = [pair for each in matches for pair in each.pairs]
    totals = Counter(_group(label) for each in matches for label in each.labels)
    counted = Counter(_group(label) for label, _ in pairs)
    agreeing = Counter(_group(label) for label, each in pairs if each.class_name in label.classes)
    num_right_colors = sum(_group(label) == NAMED and each.color in label.colors for label, each in pairs)
    certain = [each for each in matches if not any(label.kind == DOUBTFUL for label in each.labels)]
    return {
        "objects": totals[NAMED],
        "counted": _share(counted[NAMED], totals[NAMED]),
        "counted_as_class": _share(agreeing[NAMED], totals[NAMED]),
        "class_agrees": _share(agreeing[NAMED], counted[NAMED]),
        "color_agrees": _share(num_right_colors, counted[NAMED]),
        "smears": totals[SMEAR],
        "smears_counted": _share(counted[SMEAR], totals[SMEAR]),
        "doubtful": totals[DOUBTFUL],
        "doubtful_counted": _share(counted[DOUBTFUL], totals[DOUBTFUL]),
        "doubtful_agrees": _share(agreeing[DOUBTFUL], counted[DOUBTFUL]),
        "extra": sum(len(each.extra) for each in matches),
        "certain_images": len(certain),
        "images_agree": _share(sum(_counts_agree(each) for each in certain), len(certain)),
    }


def confusion(matches: Sequence[Match]) -> dict[str, dict[str, int]]:
    """Count what was detected, in columns, for what a person saw, in rows.

    Rows are the classes, `doubtful`, `smear`, and `nothing` for detections where a person sees nothing; columns are the
    classes, and `missed` for what has no detection.
    """
    counted: Counter[tuple[str, str]] = Counter()
    for each in matches:
        counted.update((label.kind, detection.class_name) for label, detection in each.pairs)
        counted.update((label.kind, MISSED) for label in each.missed)
        counted.update((NOTHING, detection.class_name) for detection in each.extra)
    rows, columns = (*CLASSES, DOUBTFUL, SMEAR, NOTHING), (*CLASSES, MISSED)
    return {row: {column: counted[row, column] for column in columns} for row in rows}


def _group(label: LabelledObject) -> str:
    return label.kind if label.kind in (SMEAR, DOUBTFUL) else NAMED


def _counts_agree(each: Match) -> bool:
    """Return whether person and detector see the same number of objects of every class."""
    seen = Counter(label.kind for label in each.labels if label.kind != SMEAR)
    return seen == Counter(detection.class_name for detection in each.detections)


def centre_distance(label: LabelledObject, box: Box) -> float:
    """Return the pixels between a label and the centre of a box."""
    left, top, right, bottom = box
    return math.hypot((left + right) / 2 - label.x, (top + bottom) / 2 - label.y)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
