"""Segmentation of shapes images: soft masks of everything that stands out from the ground, touching objects apart.

The ground is the median of the image's border. Pixels that differ from it form connected components; each becomes a
soft mask: how far a pixel lies between the ground and the component's colour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.shapes.world import IMAGE_SIZE, PALETTE

CONTRAST = 17.0
"""Lab distance from the ground beyond which a pixel belongs to an object."""
MIN_AREA = 9.0
"""Pixels; smaller components are specks."""
FAINTEST = 0.08
"""Move towards the object below which a pixel is ground."""
NECK_PROMINENCE = 0.5
"""Pixels by which the half width of two parts must exceed that of the neck between them."""
SEAM_LEVELS = (0.6, 0.7, 0.8, 0.9)
"""Shares of the object's colour at which a component is tried to fall apart."""

WINDOWS = (16, 24, 32)
"""Sides of the square windows that components are cropped to: the smallest that holds one with its margin."""
_MARGIN = 2
"""Pixels around a component that a search for parts sees: a soft mask reaches one beyond it."""
_ZOOM = 2
_NECK_STEP = 0.25

Mask = NDArray[np.bool_]
SoftMask = NDArray[np.float32]
Components = NDArray[np.int32]
"""Rows of image, label, left, top, width, height: [M, 6]."""


def to_lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert sRGB [H, W, 3] to CIE L*a*b*."""
    return cv2.cvtColor(rgb.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)


_PALETTE_LAB = to_lab(np.asarray([list(PALETTE.values())], dtype=np.uint8))[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """What stands out from the ground in a batch of images, M regions in all."""

    masks: NDArray[np.float32]
    """Share of every pixel's move from the ground to the region's colour, [M, H, W] in 0..1."""
    owners: NDArray[np.int32]
    """Index of the image, [M]."""
    colors: NDArray[np.intp]
    """Index of the nearest colour of the palette in Lab, [M]."""
    contrast: NDArray[np.float32]
    """Lab distance of the region's colour from the ground, [M]."""

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @classmethod
    def joined(cls, *parts: Self) -> Self:
        """Concatenate the regions of the same images."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class Segmentation:
    """The regions of RGB images [N, 32, 32, 3]."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        lab = to_lab(images.reshape(-1, IMAGE_SIZE, 3)).reshape(images.shape)
        border = np.concatenate([lab[:, 0], lab[:, -1], lab[:, 1:-1, 0], lab[:, 1:-1, -1]], axis=1)
        self._ground = np.median(border, axis=1)
        self._delta = lab - self._ground[:, None, None]
        self._distance = np.sqrt((self._delta**2).sum(axis=-1))
        self._labels, self._components = _label(self._distance > CONTRAST)
        self.regions = self._regions_of(self._labels, self._components)

    def split(self, rows: NDArray[np.intp]) -> tuple[Regions, NDArray[np.intp]]:
        """Split regions into what may be touching objects: by the first of `SPLITS` that finds parts.

        Args:
            rows: The regions to look at.

        Returns:
            The parts of those that can be split, and the row of the region that each part is of.
        """
        labels = self._labels.copy()
        components: list[tuple[int, ...]] = []
        wholes: list[int] = []
        for row in rows.tolist():
            owner, label, left, top, width, height = self._components[row]
            first_row, first_column = max(top - _MARGIN, 0), max(left - _MARGIN, 0)
            window = slice(first_row, top + height + _MARGIN), slice(first_column, left + width + _MARGIN)
            own, mask = self._labels[owner][window] == label, self.regions.masks[row][window]
            for part in next((found for find in SPLITS if (found := find(own, mask))), ()):
                # An image has fewer components than pixels.
                new_label = IMAGE_SIZE**2 + len(components)
                labels[owner][window][part] = new_label
                x, y, *extent = cv2.boundingRect(part.astype(np.uint8))
                components.append((owner, new_label, first_column + x, first_row + y, *extent))
                wholes.append(row)
        parts = self._regions_of(labels, np.array(components, dtype=np.int32).reshape(-1, 6))
        return parts, np.array(wholes, dtype=np.intp)

    def _regions_of(self, labels: NDArray[np.int32], components: Components) -> Regions:
        masks, move = _soft_masks(labels, self._delta, self._distance, components)
        owners = components[:, 0]
        from_palette = ((_PALETTE_LAB - (move + self._ground[owners])[:, None]) ** 2).sum(axis=-1)
        return Regions(
            masks=masks,
            owners=owners,
            colors=from_palette.argmin(axis=-1),
            contrast=np.sqrt((move**2).sum(axis=-1)),
        )


def parts_by_color(own: Mask, mask: SoftMask) -> list[Mask]:
    """Split a component into its colour and what is of another one.

    A pixel of the component that is hardly in its soft mask has another colour or is an edge, and edges are at most
    two pixels wide.
    """
    other = own & (mask < 0.5)
    if other.sum() < MIN_AREA:
        return []
    other = cv2.morphologyEx(other.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    parts = _large_components(other.astype(bool))
    return [own & ~np.any(parts, axis=0), *parts] if parts else []


def parts_at_seams(own: Mask, mask: SoftMask) -> list[Mask]:
    """Split a component where it is fainter, at the least level that parts it."""
    for level in SEAM_LEVELS:
        above = mask > level
        if above.sum() < 2 * MIN_AREA:
            break
        cores = _large_components(above)
        if len(cores) > 1:
            return _nearest(own, [_distance_to(core) for core in cores])
    return []


def parts_around_holes(own: Mask, mask: SoftMask) -> list[Mask]:
    """Split a component with several holes: two rings."""
    framed = np.pad(mask <= 0.5, 1, constant_values=True)
    _, labels = cv2.connectedComponents(framed.astype(np.uint8), connectivity=4)
    outside = labels[0, 0]
    holes = [
        hole for label in np.unique(labels[labels > 0]) if label != outside and (hole := labels == label).sum() > 1
    ]
    return _nearest(own, [_distance_to(hole[1:-1, 1:-1]) for hole in holes]) if len(holes) > 1 else []


def parts_at_necks(own: Mask, mask: SoftMask) -> list[Mask]:
    """Split a component where it is narrow.

    The half width of a place is its distance from the mask's edge. Two places are apart if every way between them
    leads over one whose half width is less than theirs by `NECK_PROMINENCE`. The least half width that parts the mask
    is taken.
    """
    size = (mask.shape[1] * _ZOOM, mask.shape[0] * _ZOOM)
    inside = (cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR) > 0.5).astype(np.uint8)
    framed = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    half_width = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1] / _ZOOM
    for level in np.arange(2 * _NECK_STEP, half_width.max() - NECK_PROMINENCE, _NECK_STEP):
        num_labels, labels = cv2.connectedComponents((half_width > level).astype(np.uint8), connectivity=8)
        cores = [labels == label for label in range(1, num_labels)]
        cores = [core for core in cores if half_width[core].max() >= level + NECK_PROMINENCE]
        if len(cores) > 1:
            far = [cv2.resize(_distance_to(core), mask.shape[::-1], interpolation=cv2.INTER_AREA) for core in cores]
            return _nearest(own, far)
    return []


SPLITS = (parts_by_color, parts_at_seams, parts_around_holes, parts_at_necks)
"""Ways to split a component, [H, W], with its soft mask into parts; they return nothing where they find none."""


def _large_components(mask: Mask) -> list[Mask]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return [labels == 1 + index for index, area in enumerate(stats[1:, cv2.CC_STAT_AREA]) if area >= MIN_AREA]


def _distance_to(core: Mask) -> NDArray[np.float32]:
    return np.asarray(cv2.distanceTransform(1 - core.astype(np.uint8), cv2.DIST_L2, 5))


def _nearest(own: Mask, distances: Sequence[NDArray[np.float32]]) -> list[Mask]:
    """Give each pixel of a component to the core that is nearest."""
    nearest = np.argmin(distances, axis=0)
    return [own & (nearest == index) for index in range(len(distances))]


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
    """Return how far every pixel has moved from the ground to its component's colour, [M, H, W] in 0..1, and the moves.

    The move is the median over the component's most distant half. A component reaches one pixel into the ground, for
    the sake of its soft edge, but never into its neighbours.
    """
    masks = np.zeros((len(components), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    direction = np.zeros((len(components), 3), dtype=np.float32)
    for side, chosen in by_window(components[:, 4:].max(axis=1, initial=0) + 2):
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
    """Return the median of the `number` greatest values of every window [M, H, W]; of two their mean, or the upper."""
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


def by_window(extents: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield every window side with the components that need it; the largest also takes those that do not fit."""
    fits = np.searchsorted(WINDOWS[:-1], extents)
    for index, side in enumerate(WINDOWS):
        chosen = np.flatnonzero(fits == index)
        if len(chosen):
            yield side, chosen
