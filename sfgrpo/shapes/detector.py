"""A detector of classes, boxes, colours and scores in shapes images: deterministic, fitted to what people see.

What stands out from the ground is segmented and compared with the silhouettes of all classes. A logistic regression
turns the overlaps into the probability that a person accepts a region as an object of a class. It was fitted to the
images of `data/shapes_labels`, which people have read by eye, by `python -m benchmarks.fit_detector`. The score says
whether an object is there, not how well it is drawn: see `score_of`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.segmentation import MIN_AREA, Regions, Segmentation
from sfgrpo.shapes.silhouettes import drawn_overlap, outlines, stretched_overlap
from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE
from sfgrpo.types import Detection

WELL_MATCHED = 0.82
"""Overlap from which on a region is one object for certain, so that no split is tried."""
PART_MATCH = 0.5
"""Overlap that every part of a split region must reach."""
COUNTED_PROBABILITY = 0.45
"""Probability of acceptance that scores 0.9, GenEval's threshold for counting."""
PRESENT_PROBABILITY = 0.3
"""Probability of acceptance that scores 0.3, GenEval's threshold for anything else."""
MATCH_FLOOR, MATCH_CEILING = 0.50, 0.90
"""Overlap with a silhouette at which the quality of an object is 0, and from which on nothing takes away from it."""
COEFFICIENTS = Path(__file__).with_name("detector.json")

_CHUNK = 64
"""Images processed at once: few enough for the processor's cache."""


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """Find the shapes of one RGB image [32, 32, 3], most confident first."""
    return detect_images(image[None])[0]


def detect_images(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """Find the shapes of RGB images [N, 32, 32, 3]; return the detections of each, most confident first.

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images have shape {list(images.shape)}; the shapes detector reads [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    found: list[list[Detection]] = []
    for start in range(0, len(images), _CHUNK):
        found += _detect_chunk(images[start : start + _CHUNK])
    return found


def _detect_chunk(images: NDArray[np.uint8]) -> list[list[Detection]]:
    regions, overlaps = matched_regions(images)
    probability = acceptance(features(regions, overlaps))
    best, scores = probability.argmax(axis=1), score_of(probability.max(axis=1))
    likeness = (overlaps.drawn.max(axis=1) - MATCH_FLOOR) / (MATCH_CEILING - MATCH_FLOOR)
    qualities = probability.max(axis=1) * np.clip(likeness, 0.0, 1.0)
    boxes = boxes_of(regions.masks)
    found: list[list[Detection]] = [[] for _ in images]
    for index in np.argsort(-scores, kind="stable"):
        left, top, right, bottom = map(float, boxes[index])
        found[regions.owners[index]].append(
            Detection(
                class_name=CLASSES[best[index]],
                box=(left, top, right, bottom),
                score=float(scores[index]),
                color=COLORS[regions.colors[index]],
                quality=float(qualities[index]),
            )
        )
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overlaps:
    """Soft IoU of M regions with the silhouettes of all classes."""

    drawn: NDArray[np.float32]
    """With the silhouette as it is drawn, [M, class]."""
    stretched: NDArray[np.float32]
    """Whatever the aspect ratio, [M, class]."""

    @property
    def best(self) -> NDArray[np.float32]:
        """The greater of both, [M, class]."""
        return np.maximum(self.drawn, self.stretched)


def matched_regions(images: NDArray[np.uint8]) -> tuple[Regions, Overlaps]:
    """Segment images [N, 32, 32, 3]; split a region where its parts match silhouettes better than the whole does."""
    segmentation = Segmentation(images)
    wholes = segmentation.regions
    clear = np.flatnonzero(_is_clear(wholes))
    overlaps = _overlaps(wholes[clear])
    match = np.zeros(len(wholes))
    match[clear] = overlaps.drawn.max(axis=1)
    large = wholes.masks[clear].sum(axis=(1, 2)) >= 2 * MIN_AREA
    parts, whole_of_part = segmentation.split(clear[large & (match[clear] < WELL_MATCHED)])
    clear_parts = np.flatnonzero(_is_clear(parts))
    part_match = np.zeros(len(parts))
    part_match[clear_parts] = _overlaps(parts[clear_parts]).drawn.max(axis=1)
    split = [
        whole
        for whole in np.unique(whole_of_part)
        if (matches := part_match[whole_of_part == whole]).min() >= PART_MATCH and matches.mean() > match[whole]
    ]
    regions = Regions.joined(
        wholes[clear[~np.isin(clear, split)]], parts[np.flatnonzero(np.isin(whole_of_part, split))]
    )
    return regions, _overlaps(regions)


def features(regions: Regions, overlaps: Overlaps) -> NDArray[np.float64]:
    """Return what the logistic regression sees of M regions: [M, feature]."""
    ordered = np.sort(overlaps.best, axis=1)
    return np.column_stack(
        [
            overlaps.drawn,
            overlaps.stretched,
            overlaps.drawn**2,
            overlaps.stretched**2,
            ordered[:, -1],
            ordered[:, -1] - ordered[:, -2],
            regions.contrast,
            outlines(regions.masks),
        ]
    ).astype(np.float64)


def acceptance(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability that a person accepts a region as an object of a class, [M, class].

    They do not add up to 1: a person may accept a blob as a circle and as a heart, or as nothing.
    """
    weights, bias = _coefficients()
    # A matrix product would round an image's scores by how many others are in the batch.
    return 1.0 / (1.0 + np.exp(-((features[:, :, None] * weights).sum(axis=1) + bias)))


def score_of(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores of detections, given the probabilities that a person accepts them.

    The score is a steep function of the probability, logistic in its log-odds. GenEval counts objects by scores above
    0.9. To miscount least, an object must count as soon as it is about as likely there as not, hence
    `COUNTED_PROBABILITY`. A score that is lower for a poor object than for a good one would let a policy hide objects
    that are too many by drawing them badly.
    """
    low, high = (_log_odds(np.float64(value)) for value in (PRESENT_PROBABILITY, COUNTED_PROBABILITY))
    slope = (_log_odds(np.float64(0.9)) - _log_odds(np.float64(0.3))) / (high - low)
    return 1.0 / (1.0 + np.exp(-(slope * (_log_odds(probability) - low) + _log_odds(np.float64(0.3)))))


def _log_odds(probability: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    clipped = np.clip(probability, 1e-6, 1.0 - 1e-6)
    return np.log(clipped / (1.0 - clipped))


@functools.cache
def _coefficients() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights [feature, class] and bias [class] of the logistic regression."""
    values = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    return np.array(values["weights"]), np.array(values["bias"])


def _is_clear(regions: Regions) -> NDArray[np.bool_]:
    return (regions.masks.sum(axis=(1, 2)) >= MIN_AREA) & (regions.masks.max(axis=(1, 2), initial=0.0) > 0.5)


def _overlaps(regions: Regions) -> Overlaps:
    return Overlaps(drawn=drawn_overlap(regions.masks), stretched=stretched_overlap(regions.masks))


def boxes_of(masks: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return boxes (left, top, right, bottom) around the pixels of masks [M, H, W] above one half: [M, 4]."""
    across, down = masks.max(axis=1) > 0.5, masks.max(axis=2) > 0.5
    ends = [IMAGE_SIZE - side[:, ::-1].argmax(axis=1) for side in (across, down)]
    return np.stack([across.argmax(axis=1), down.argmax(axis=1), *ends], axis=1)
