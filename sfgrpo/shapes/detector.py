"""A detector of classes, boxes, colours and scores in shapes images: deterministic, without weights or training.

The ground is the median of the image's border. Pixels that differ from it form connected components; each becomes a
soft mask (how far a pixel lies between the ground and the component's colour) and is compared with the silhouette of
every class at the component's own centroid and area. As in Mask2Former, the score is the product of a class
probability (how much better the best class matches than the others) and a mask quality (how well it matches).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE, PALETTE, coverage
from sfgrpo.types import Detection

CONTRAST = 17.0
"""Lab distance from the ground beyond which a pixel belongs to an object."""
MIN_AREA = 9.0
"""Pixels; smaller components are specks."""
CLASS_TEMPERATURE = 0.018
"""Softness of the class probability over silhouette IoUs."""
MATCH_FLOOR, MATCH_CEILING = 0.50, 0.84
"""Silhouette IoU at which the mask quality is 0, and from which on it is 1."""
FAINTEST = 0.08
"""Move towards the object below which a pixel is ground."""

_WINDOWS = (16, 24, 32)
"""Sides of the square windows that components are cropped to: the smallest that holds one with its margin."""
_CHUNK = 64
"""Images processed at once: few enough for the processor's cache."""
_SUBPIXELS = 4
_RADIUS_STEP = 0.25
_RADII = np.arange(1.5, 14.0, _RADIUS_STEP)


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return silhouettes around their centroids, [class, radius, subpixel y, subpixel x, H, W]; areas at radius 1."""
    side = _WINDOWS[-1]
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


def _to_lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    return cv2.cvtColor(rgb.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)


_PALETTE_LAB = _to_lab(np.asarray([list(PALETTE.values())], dtype=np.uint8))[0]


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
    lab = _to_lab(images.reshape(-1, IMAGE_SIZE, 3)).reshape(images.shape)
    border = np.concatenate([lab[:, 0], lab[:, -1], lab[:, 1:-1, 0], lab[:, 1:-1, -1]], axis=1)
    ground = np.median(border, axis=1)
    delta = lab - ground[:, None, None]
    distance = np.sqrt((delta**2).sum(axis=-1))
    labels, components = _label(distance > CONTRAST)
    masks, direction = _soft_masks(labels, delta, distance, components)
    hue = direction + ground[components[:, 0]]
    nearest = ((_PALETTE_LAB - hue[:, None]) ** 2).sum(axis=-1).argmin(axis=-1)

    clear = (masks.sum(axis=(1, 2)) >= MIN_AREA) & (masks.max(axis=(1, 2)) > 0.5)
    masks, nearest, owner = masks[clear], nearest[clear], components[clear, 0]
    overlap = _match(masks)
    best = overlap.argmax(axis=1)
    peak = overlap.max(axis=1)
    probability = 1.0 / np.exp((overlap - peak[:, None]) / CLASS_TEMPERATURE).sum(axis=1)
    quality = np.clip((peak - MATCH_FLOOR) / (MATCH_CEILING - MATCH_FLOOR), 0.0, 1.0)
    boxes = _boxes(masks)
    found: list[list[Detection]] = [[] for _ in images]
    for index in np.argsort(-probability * quality, kind="stable"):
        left, top, right, bottom = map(float, boxes[index])
        found[owner[index]].append(
            Detection(
                class_name=CLASSES[best[index]],
                box=(left, top, right, bottom),
                score=float(probability[index] * quality[index]),
                color=COLORS[nearest[index]],
            )
        )
    return found


def _label(foreground: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Label the connected components of masks [N, H, W], and list those of at least `MIN_AREA`: [M, 6].

    A row is image, label, left, top, width, height.
    """
    labels = np.empty(foreground.shape, dtype=np.int32)
    rows: list[tuple[int, ...]] = []
    for image, mask in enumerate(foreground.view(np.uint8)):
        _, labels[image], stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        rows += [(image, 1 + label, *box) for label, (*box, area) in enumerate(stats[1:].tolist()) if area >= MIN_AREA]
    return labels, np.array(rows, dtype=np.int32).reshape(-1, 6)


def _soft_masks(
    labels: NDArray[np.int32], delta: NDArray[np.float32], distance: NDArray[np.float32], components: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How far every pixel has moved from the ground to its component's colour: [M, H, W] in 0..1; the moves [M, 3].

    The move is the median over the component's most distant half. A component reaches one pixel into the ground, for
    the sake of its soft edge, but never into its neighbours.
    """
    masks = np.zeros((len(components), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    direction = np.zeros((len(components), 3), dtype=np.float32)
    for side, chosen in _by_window(components[:, 4:].max(axis=1, initial=0) + 2):
        image, label, left, top, width, height = (column[:, None, None] for column in components[chosen].T)
        first_row = np.clip(top + height // 2 - side // 2, 0, IMAGE_SIZE - side)
        first_column = np.clip(left + width // 2 - side // 2, 0, IMAGE_SIZE - side)
        window = image, first_row + np.arange(side)[:, None], first_column + np.arange(side)
        label_at, delta_at = labels[window], delta[window]
        own = label_at == label
        far = np.where(own, distance[window], -np.inf)
        core = own & (far >= _median_of(far, own.sum(axis=(1, 2)), upper=True)[:, None, None])
        number = core.sum(axis=(1, 2))
        move = np.stack([_median_of(np.where(core, delta_at[..., c], -np.inf), number) for c in range(3)], axis=1)
        shift = np.einsum("nhwc,nc->nhw", delta_at, move) / np.maximum((move**2).sum(axis=1), 1e-6)[:, None, None]
        mask = np.where(_dilate(own) & (own | (label_at == 0)), np.clip(shift, 0.0, 1.0), 0.0)
        masks[(chosen[:, None, None], *window[1:])] = np.where(mask < FAINTEST, 0.0, mask)
        direction[chosen] = move
    return masks, direction


def _median_of(values: NDArray[np.float32], number: NDArray[np.int64], upper: bool = False) -> NDArray[np.float32]:
    """Median of the `number` greatest values of every window [M, H, W]; of two middle ones their mean, or the upper."""
    ordered = np.sort(values.reshape(len(values), -1), axis=1)
    row, size = np.arange(len(values)), ordered.shape[1]
    high = ordered[row, size - number + number // 2]
    return high if upper else (high + ordered[row, size - number + (number - 1) // 2]) / 2


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Grow masks [M, H, W] by one pixel in all eight directions."""
    tall = mask.copy()
    tall[:, 1:] |= mask[:, :-1]
    tall[:, :-1] |= mask[:, 1:]
    wide = tall.copy()
    wide[:, :, 1:] |= tall[:, :, :-1]
    wide[:, :, :-1] |= tall[:, :, 1:]
    return wide


def _match(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Best soft IoU of masks [M, H, W] with every class's silhouette at their own centroid and area: [M, class]."""
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
    for side, chosen in _by_window(2 * reach):
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


def _reach(profile: NDArray[np.float64], center: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pixels from the centre to the farther end of a mask, given its profile [M, pixels] along one axis."""
    filled = profile > 0.0
    first, last = filled.argmax(axis=1), profile.shape[1] - filled[:, ::-1].argmax(axis=1)
    return np.maximum(center.astype(int) - first, last - center.astype(int))


def _by_window(extents: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield every window side with the components that need it; the largest also takes those that do not fit."""
    fits = np.searchsorted(_WINDOWS[:-1], extents)
    for index, side in enumerate(_WINDOWS):
        chosen = np.flatnonzero(fits == index)
        if len(chosen):
            yield side, chosen


def _boxes(masks: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return boxes (left, top, right, bottom) around the pixels of masks [M, H, W] above one half: [M, 4]."""
    across, down = masks.max(axis=1) > 0.5, masks.max(axis=2) > 0.5
    ends = [IMAGE_SIZE - side[:, ::-1].argmax(axis=1) for side in (across, down)]
    return np.stack([across.argmax(axis=1), down.argmax(axis=1), *ends], axis=1)
