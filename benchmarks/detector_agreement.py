"""How far detections agree with what a person saw: matching by distance, shares and confusion table."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.labels import LabelledImage, LabelledObject
from sfgrpo.shapes.world import CLASSES
from sfgrpo.types import Detection

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
        if (distance := _distance(label, detection)) <= MAX_DISTANCE
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

    `counted` is the share of the objects with a class that have a detection of any class, `counted_as_class` that of
    those with one of their own, `class_agrees` and `color_agrees` are shares of the counted ones, `smears_counted` is
    that of the things without a class; `extra` is a number.
    """
    pairs = [pair for each in matches for pair in each.pairs]
    named = [(label, detection) for label, detection in pairs if label.class_name is not None]
    labels = [label for each in matches for label in each.labels]
    num_objects = sum(label.class_name is not None for label in labels)
    num_smears = len(labels) - num_objects
    num_right = sum(label.class_name == each.class_name for label, each in named)
    return {
        "objects": num_objects,
        "counted": _share(len(named), num_objects),
        "counted_as_class": _share(num_right, num_objects),
        "class_agrees": _share(num_right, len(named)),
        "color_agrees": _share(sum(label.color == each.color for label, each in named), len(named)),
        "smears": num_smears,
        "smears_counted": _share(len(pairs) - len(named), num_smears),
        "extra": sum(len(each.extra) for each in matches),
        "images_agree": _share(sum(_counts_agree(each) for each in matches), len(matches)),
    }


def confusion(matches: Sequence[Match], smear: str, missed: str, nothing: str) -> dict[str, dict[str, int]]:
    """Count what was detected, in columns, for what a person saw, in rows.

    Rows are the classes, `smear` for things without a class, and `nothing` for detections where a person sees nothing;
    columns are the classes, and `missed` for what has no detection.
    """
    counted: Counter[tuple[str, str]] = Counter()
    for each in matches:
        counted.update((label.class_name or smear, detection.class_name) for label, detection in each.pairs)
        counted.update((label.class_name or smear, missed) for label in each.missed)
        counted.update((nothing, detection.class_name) for detection in each.extra)
    return {row: {column: counted[row, column] for column in (*CLASSES, missed)} for row in (*CLASSES, smear, nothing)}


def _counts_agree(each: Match) -> bool:
    """Return whether person and detector see the same number of objects of every class."""
    seen: Iterable[str] = (label.class_name for label in each.labels if label.class_name is not None)
    return Counter(seen) == Counter(detection.class_name for detection in each.detections)


def _distance(label: LabelledObject, detection: Detection) -> float:
    left, top, right, bottom = detection.box
    return math.hypot((left + right) / 2 - label.x, (top + bottom) / 2 - label.y)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
