"""A second opinion on how many objects a shapes image shows, which shares no cue with the detector.

The detector asks what an object is: it compares silhouettes, in Lab, of the connected components at one threshold. The
counter only asks how many things there are, whatever their class, colour and quality. It builds a landscape whose
height says how deep inside something a pixel lies, and counts the summits:

    height = solid part of the contrast + depth below several contours of the contrast, in pixels

The contrast is the largest difference of a channel, in RGB, from the ground, which is the mode of the grey values. The
depth of a pixel is its distance from the outline, holes filled, so that a ring is one summit, and so are a cross and a
heart. Two blobs that touch have a saddle between them, at their neck or where the contrast fades, and are two if both
rise well above it (persistence in the component tree of the landscape; Edelsbrunner, Letscher and Zomorodian,
Topological Persistence and Simplification, 2002).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.world import IMAGE_SIZE

CONTOURS = (24.0, 40.0, 64.0)
"""Contrasts, of 255, of the contours below which the depth is measured; the faintest colour has about 80."""
SOLID = 64.0
"""Contrast that counts in full."""
DEEPEST = 4.0
"""Pixels; a large object has no summits beyond it."""
LEAST_HEIGHT = 0.9
"""Height of the lowest summit that is an object; anything lower is a speck or a shadow."""
LEAST_RISE = 0.6
"""Height above the saddle to a higher summit from which on the lower one is another object."""
LEAST_AREA = 3
"""Pixels of the smallest summit."""

_LEVELS = np.arange(0.3, 1.0 + DEEPEST, 0.2)
_SLACK = 1e-6
"""Of comparisons between sums of level steps."""
_SCALE = 2
"""Pixels of the depth's grid on the side of a pixel."""
_MARGIN = 2
_SIDE = IMAGE_SIZE + 2 * _MARGIN
_CHUNK = 64
"""Images processed at once, one below the other: few enough for the processor's cache."""

Integers = NDArray[np.integer[Any]]


def count_objects(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the visible objects of RGB images [N, 32, 32, 3], of any class and quality: [N].

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images have shape {list(images.shape)}; the shapes counter reads [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    counts = np.zeros(len(images), dtype=np.int64)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        counts[chunk] = _count_summits(_landscape(_contrast(images[chunk])), len(counts[chunk]))
    return counts


def _contrast(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the contrasts of N images, one below the other, each with a margin of ground: [N * side, side]."""
    number = len(images)
    grey = images.sum(axis=-1, dtype=np.int32).reshape(number, -1) // 3
    histogram = np.bincount((grey + 256 * np.arange(number)[:, None]).ravel(), minlength=256 * number)
    # Sums over five neighbouring values, so that noise does not choose among them.
    smooth = cv2.blur(histogram.reshape(number, 256).astype(np.float32), (5, 1), borderType=cv2.BORDER_CONSTANT)
    ground = smooth.argmax(axis=1)[:, None, None, None]
    contrast = np.zeros((number, _SIDE, _SIDE), dtype=np.float32)
    inside = slice(_MARGIN, _MARGIN + IMAGE_SIZE)
    contrast[:, inside, inside] = np.abs(images.astype(np.int16) - ground).max(axis=-1)
    return contrast.reshape(-1, _SIDE)


def _landscape(contrast: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how deep inside something every pixel lies."""
    fine = cv2.resize(contrast, None, fx=_SCALE, fy=_SCALE, interpolation=cv2.INTER_LINEAR)
    depth = np.zeros_like(fine)
    for contour in CONTOURS:
        outside = (fine >= contour).astype(np.uint8)
        # The margins connect all ground that is not a hole.
        cv2.floodFill(outside, None, (0, 0), 2)
        distance = cv2.distanceTransform((outside != 2).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
        depth += np.minimum(distance, _SCALE * DEEPEST)
    depth = cv2.resize(depth, contrast.shape[::-1], interpolation=cv2.INTER_AREA) / (_SCALE * len(CONTOURS))
    smooth = cv2.GaussianBlur(contrast, (0, 0), 0.8)
    height: NDArray[np.float32] = np.minimum(smooth, SOLID) / SOLID + depth
    return height


def _count_summits(height: NDArray[np.float32], number: int) -> NDArray[np.int64]:
    """Count the summits of every image by sinking the water level from above all summits to the ground."""
    components = [_components(height >= level) for level in _LEVELS]
    labels, areas, pixels = components[-1]
    tops, counts = _islands(areas, len(_LEVELS) - 1)
    for level in reversed(range(len(_LEVELS) - 1)):
        labels, areas, below = components[level]
        parents = labels[pixels]
        tops, counts = _join(*_islands(areas, level), parents, tops, counts, level)
        pixels = below
    objects = (tops >= 0) & (_LEVELS[tops] >= LEAST_HEIGHT - _SLACK)
    return np.bincount(pixels[objects] // (_SIDE * _SIDE), counts[objects], minlength=number).astype(np.int64)


def _components(mask: NDArray[np.bool_]) -> tuple[Integers, Integers, Integers]:
    """Label connected pixels; return the label of every pixel, and area and one pixel of every label but the ground.

    The labels are those of a flat image and start at -1, the ground.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    flat = labels.ravel() - 1
    islands = np.flatnonzero(flat >= 0)
    pixels = np.zeros(len(stats) - 1, dtype=np.int64)
    pixels[flat[islands]] = islands
    return flat, stats[1:, cv2.CC_STAT_AREA], pixels


def _islands(areas: Integers, level: int) -> tuple[Integers, Integers]:
    """Return index of the highest level and number of objects of islands that have only emerged; -1 of tiny ones."""
    large = areas >= LEAST_AREA
    return np.where(large, level, -1), large.astype(np.int64)


def _join(
    tops: Integers, counts: Integers, parents: Integers, child_tops: Integers, child_counts: Integers, level: int
) -> tuple[Integers, Integers]:
    """Carry tops and counts of the islands at one level to those that they are part of at the next lower one.

    Of several that become one, the highest lives on, and each other one is added if it rose high enough.
    """
    children = np.flatnonzero(child_tops >= 0)
    children = children[np.lexsort((child_tops[children], parents[children]))]
    parent = parents[children]
    highest = np.append(parent[1:] != parent[:-1], True)[: len(parent)]
    tops[parent[highest]] = child_tops[children[highest]]
    counts[parent[highest]] = child_counts[children[highest]]
    rise = _LEVELS[child_tops[children]] - _LEVELS[level]
    other = ~highest & (rise >= LEAST_RISE - _SLACK)
    np.add.at(counts, parent[other], child_counts[children[other]])
    return tops, counts
