"""How well soft masks match the silhouettes of the classes: as drawn, and whatever their aspect ratio."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.segmentation import WINDOWS, by_window
from sfgrpo.shapes.world import CLASSES, IMAGE_SIZE, coverage

STRETCHED_SIDE = 12
"""Pixels along each axis of a mask that is stretched to one size."""
STRETCHED_SPAN = 2.2
"""Standard deviations from the centroid to the edge of a stretched mask."""

_ZOOM = 2
_SUBPIXELS = 4
_RADIUS_STEP = 0.25
_RADII = np.arange(1.5, 14.0, _RADIUS_STEP)
_STRETCHED_RADII = (4.5, 6.0, 8.0)
_LEAST_VARIANCE = 0.3
"""Pixels squared; keeps a line from being stretched without bound."""


def drawn_overlap(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the soft IoU of masks [M, H, W] with every class's silhouette at their centroid and area: [M, class]."""
    _, class_areas = _templates()
    pixels = np.arange(IMAGE_SIZE)
    in_rows, in_columns = masks.sum(axis=2, dtype=np.float64), masks.sum(axis=1, dtype=np.float64)
    areas = in_rows.sum(axis=1)
    y = (in_rows * (pixels + 0.5)).sum(axis=1) / areas
    x = (in_columns * (pixels + 0.5)).sum(axis=1) / areas
    levels = np.rint((np.sqrt(areas[:, None] / class_areas) - _RADII[0]) / _RADIUS_STEP).astype(int)
    levels = np.clip(levels[..., None] + np.array([-1, 0, 1]), 0, len(_RADII) - 1)
    reach = np.maximum(_reach(in_rows, y), _reach(in_columns, x))
    overlap = np.empty((len(masks), len(CLASSES)), dtype=np.float32)
    for side, chosen in by_window(2 * reach):
        bank, bank_areas = _bank(side)
        at = (
            np.arange(len(CLASSES))[:, None],
            levels[chosen],
            (y[chosen] % 1 * _SUBPIXELS).astype(int)[:, None, None],
            (x[chosen] % 1 * _SUBPIXELS).astype(int)[:, None, None],
        )
        row = y[chosen].astype(int)[:, None, None] - side // 2 + np.arange(side)[:, None]
        column = x[chosen].astype(int)[:, None, None] - side // 2 + np.arange(side)
        inside = (row >= 0) & (row < IMAGE_SIZE) & (column >= 0) & (column < IMAGE_SIZE)
        window = np.where(inside, masks[chosen[:, None, None], row % IMAGE_SIZE, column % IMAGE_SIZE], np.float32(0.0))
        common = np.minimum(bank[at], window[:, None, None]).sum(axis=(-2, -1))
        overlap[chosen] = (common / (bank_areas[at] + areas[chosen, None, None] - common)).max(axis=2)
    return overlap


def stretched_overlap(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the soft IoU of masks [M, H, W] with every class's silhouette, both stretched to one size: [M, class].

    A person calls a flat heart a heart, which `drawn_overlap` does not know.
    """
    stretched, templates = stretch(masks)[:, None], _stretched_templates()
    common = np.minimum(stretched, templates).sum(axis=(-2, -1))
    return common / np.maximum(stretched, templates).sum(axis=(-2, -1))


def outlines(masks: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """Describe masks [M, H, W] without any silhouette: [M, 22].

    The columns are the logarithm of the area, the solidity (area over that of the convex hull), the softness of the
    edge, the asymmetry of left and right, and the mean of both sides of the stretched mask, in blocks of 2 x 2.
    """
    areas = masks.sum(axis=(1, 2))
    softness = (masks * (1.0 - masks)).sum(axis=(1, 2)) / np.sqrt(areas)
    half = STRETCHED_SIDE // 2
    blocks = stretch(masks).reshape(-1, half, 2, half, 2).mean(axis=(2, 4))
    left, right = blocks[..., : half // 2], blocks[..., : half // 2 - 1 : -1]
    asymmetry = np.abs(left - right).mean(axis=(1, 2))
    both = ((left + right) / 2).reshape(len(masks), half * (half // 2))
    return np.column_stack([np.log(areas), areas / _hull_areas(masks), softness, asymmetry, both])


def _hull_areas(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the areas of the convex hulls of masks [M, H, W], in pixels: [M]."""
    hulls = np.empty(len(masks), dtype=np.float32)
    for index, mask in enumerate(masks):
        inside = cv2.resize(mask, None, fx=_ZOOM, fy=_ZOOM, interpolation=cv2.INTER_LINEAR) > 0.5
        contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        area = cv2.contourArea(cv2.convexHull(np.concatenate(contours))) / _ZOOM**2 if contours else 0.0
        hulls[index] = max(area, 1.0)
    return hulls


def stretch(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Resample masks [M, H, W] to equal standard deviations along both axes, centroids in the middle."""
    rows, columns = (_stretching(masks.sum(axis=axis)) for axis in (2, 1))
    return np.asarray(rows @ masks @ columns.transpose(0, 2, 1), dtype=np.float32)


def _stretching(profile: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weights of linear interpolation along an axis, given the masks' profile [M, pixels] along it."""
    pixels = np.arange(profile.shape[1], dtype=np.float32)
    share = profile / profile.sum(axis=1, keepdims=True)
    center = (share * pixels).sum(axis=1)
    variance = (share * (pixels - center[:, None]) ** 2).sum(axis=1)
    at = np.linspace(-STRETCHED_SPAN, STRETCHED_SPAN, STRETCHED_SIDE, dtype=np.float32)
    places = center[:, None] + at * np.sqrt(np.maximum(variance, _LEAST_VARIANCE))[:, None]
    return np.clip(1.0 - np.abs(places[..., None] - pixels), 0.0, 1.0)


@functools.cache
def _stretched_templates() -> NDArray[np.float32]:
    middle = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    drawn = np.stack([[coverage(name, middle, radius) for radius in _STRETCHED_RADII] for name in CLASSES])
    stretched = stretch(drawn.reshape(-1, IMAGE_SIZE, IMAGE_SIZE))
    return stretched.reshape(len(CLASSES), len(_STRETCHED_RADII), STRETCHED_SIDE, STRETCHED_SIDE).mean(axis=1)


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return silhouettes around their centroids, [class, radius, subpixel y, subpixel x, H, W]; areas at radius 1."""
    side = WINDOWS[-1]
    middle = side / 2
    areas = np.empty(len(CLASSES))
    bank = np.empty((len(CLASSES), len(_RADII), _SUBPIXELS, _SUBPIXELS, side, side), dtype=np.float32)
    grid = np.arange(side) + 0.5
    offsets = (np.arange(_SUBPIXELS) + 0.5) / _SUBPIXELS
    for index, name in enumerate(CLASSES):
        mask = coverage(name, (middle, middle), 10.0, side).astype(np.float64)
        areas[index] = mask.sum() / 100.0
        centroid = [(mask.sum(axis) @ grid / mask.sum() - middle) / 10.0 for axis in (0, 1)]
        for level, radius in enumerate(_RADII):
            for row, dy in enumerate(offsets):
                for column, dx in enumerate(offsets):
                    center = (middle + dx - centroid[0] * radius, middle + dy - centroid[1] * radius)
                    bank[index, level, row, column] = coverage(name, center, float(radius), side)
    return bank, areas


@functools.cache
def _bank(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the middle of the templates, [..., side, side], contiguous, and their areas before the crop."""
    bank, _ = _templates()
    cut = (bank.shape[-1] - side) // 2
    return np.ascontiguousarray(bank[..., cut : cut + side, cut : cut + side]), bank.sum(axis=(-2, -1))


def _reach(profile: NDArray[np.float64], center: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pixels from the centre to the farther end of a mask, given its profile [M, pixels] along one axis."""
    filled = profile > 0.0
    first, last = filled.argmax(axis=1), profile.shape[1] - filled[:, ::-1].argmax(axis=1)
    return np.maximum(center.astype(int) - first, last - center.astype(int))
