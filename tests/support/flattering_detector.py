"""The detector of commit 53b3ab4, which a policy can flatter: its score is how well a silhouette is drawn.

A poor object has a low score, GenEval counts above .9, and so a policy gains by drawing one object too many, poorly.
The adapter in `tests/data/flattering_adapter` learned that. The detector is kept, in plain loops, as the test case of
the checks that must see it.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE, PALETTE, coverage
from sfgrpo.types import Detection

CONTRAST, MIN_AREA, FAINTEST = 17.0, 9.0, 0.08
CLASS_TEMPERATURE, MATCH_FLOOR, MATCH_CEILING = 0.018, 0.50, 0.84
SUBPIXELS, RADIUS_STEP, SMALLEST, LARGEST = 4, 0.25, 1.5, 13.75
MIDDLE = IMAGE_SIZE // 2
GRID = np.arange(IMAGE_SIZE) + 0.5


def detect_flattered(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """Find the shapes of RGB images [N, 32, 32, 3]; the score is class probability times quality of the silhouette."""
    return [sorted(_detect(image), key=lambda found: -found.score) for image in images]


def _detect(image: NDArray[np.uint8]) -> list[Detection]:
    lab = _lab(image)
    ground = np.median(np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]]), axis=0)
    delta = lab - ground
    distance = np.sqrt((delta**2).sum(axis=-1))
    number, labels, stats, _ = cv2.connectedComponentsWithStats((distance > CONTRAST).view(np.uint8), connectivity=4)
    found = []
    for label in range(1, number):
        if stats[label, cv2.CC_STAT_AREA] < MIN_AREA:
            continue
        mask, move = _soft_mask(labels, label, delta, distance)
        if mask.sum() < MIN_AREA or mask.max() <= 0.5:
            continue
        overlap = np.array([_overlap(mask, name) for name in CLASSES])
        probability = 1.0 / np.exp((overlap - overlap.max()) / CLASS_TEMPERATURE).sum()
        quality = np.clip((overlap.max() - MATCH_FLOOR) / (MATCH_CEILING - MATCH_FLOOR), 0.0, 1.0)
        palette = _lab(np.asarray([list(PALETTE.values())], dtype=np.uint8))[0]
        rows, columns = (np.flatnonzero((mask > 0.5).any(axis=axis)) for axis in (1, 0))
        found.append(
            Detection(
                class_name=CLASSES[overlap.argmax()],
                box=(float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0),
                score=float(probability * quality),
                color=COLORS[((palette - (move + ground)) ** 2).sum(axis=-1).argmin()],
            )
        )
    return found


def _lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    return cv2.cvtColor(rgb.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)


def _soft_mask(labels, label, delta, distance) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return how far every pixel has moved from the ground to a component's colour, and that move."""
    own = labels == label
    inside = np.sort(distance[own])
    core = own & (distance >= inside[len(inside) // 2])
    move = np.median(delta[core], axis=0)
    shift = (delta @ move) / max((move**2).sum(), 1e-6)
    near = cv2.dilate(own.view(np.uint8), np.ones((3, 3), dtype=np.uint8)).astype(bool)
    mask = np.where(near & (own | (labels == 0)), np.clip(shift, 0.0, 1.0), 0.0)
    return np.where(mask < FAINTEST, 0.0, mask), move


def _overlap(mask: NDArray[np.float32], name: str) -> float:
    """Return the best soft IoU of a mask with a class's silhouette at the mask's centroid and area."""
    area = mask.sum(dtype=np.float64)
    y, x = (float((mask.sum(axis=axis, dtype=np.float64) * GRID).sum() / area) for axis in (1, 0))
    level = round((np.sqrt(area / _unit(name)[0]) - SMALLEST) / RADIUS_STEP)
    window = _centered(mask, int(y), int(x))
    overlaps = []
    for step in (-1, 0, 1):
        radius = min(max(SMALLEST + RADIUS_STEP * (level + step), SMALLEST), LARGEST)
        template = _template(name, radius, int(y % 1 * SUBPIXELS), int(x % 1 * SUBPIXELS))
        common = np.minimum(template, window).sum()
        overlaps.append(common / (template.sum() + area - common))
    return float(max(overlaps))


def _centered(mask: NDArray[np.float32], y: int, x: int) -> NDArray[np.float32]:
    """Return the mask moved so that its pixel (y, x) is the middle one."""
    padded = np.pad(mask, MIDDLE)
    return padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]


@functools.cache
def _unit(name: str) -> tuple[float, float, float]:
    """Return area and centroid (y, x) of a silhouette of radius 1."""
    mask = coverage(name, (MIDDLE, MIDDLE), 10.0).astype(np.float64)
    y, x = ((mask.sum(axis=axis) @ GRID / mask.sum() - MIDDLE) / 10.0 for axis in (1, 0))
    return mask.sum() / 100.0, y, x


@functools.cache
def _template(name: str, radius: float, row: int, column: int) -> NDArray[np.float32]:
    """Draw a silhouette with its centroid at a place within the middle pixel."""
    _, y, x = _unit(name)
    dy, dx = ((index + 0.5) / SUBPIXELS for index in (row, column))
    return coverage(name, (MIDDLE + dx - x * radius, MIDDLE + dy - y * radius), radius)
