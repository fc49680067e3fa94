"""The shapes world: scenes of coloured silhouettes on a grey ground that show what a prompt asks for."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from numpy.typing import NDArray

from sfgrpo.geneval.relations import relations_between
from sfgrpo.types import Prompt

IMAGE_SIZE = 32
SUPERSAMPLING = 8

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 45),
    "green": (35, 165, 65),
    "blue": (40, 85, 225),
    "purple": (140, 45, 175),
    "black": (18, 18, 18),
    "white": (245, 245, 245),
}
GROUND_LEVELS = (118, 138)
COLOR_JITTER = 8

RADII_BY_TAG = {"single_object": (6.5, 10.0), "colors": (6.5, 10.0), "counting": (4.2, 5.2)}
"""Pixels; every other task shows two objects and uses `PAIR_RADII`."""
PAIR_RADII = (5.2, 7.2)
GAP = 1.5
"""Least distance in pixels between two objects, and between an object and the border."""

_TRIES = 64
"""Layouts sampled at once."""

Polygon = NDArray[np.float64]  # [points, 2], in units of the radius, centred on the origin, y downward


def _circle(radius: float = 1.0) -> Polygon:
    angle = np.linspace(0.0, 2 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _heart() -> Polygon:
    angle = np.linspace(0.0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
    return np.stack([x, y - 2.5], axis=1) / 15.0


def _cross(arm: float = 0.36) -> Polygon:
    corner = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    return np.array([*corner, *[(-x, -y) for x, y in corner]], dtype=np.float64)


# Outer polygon and, for the ring, the polygon of its hole.
SILHOUETTES: dict[str, tuple[Polygon, ...]] = {
    "circle": (_circle(),),
    "square": (np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),),
    "triangle": (np.array([(0.0, -1.0), (1.08, 0.87), (-1.08, 0.87)]),),
    "cross": (_cross(),),
    "heart": (_heart(),),
    "ring": (_circle(), _circle(0.52)),
}
CLASSES = tuple(SILHOUETTES)
COLORS = tuple(PALETTE)


def coverage(
    class_name: str, center: tuple[float, float], radius: float, size: int = IMAGE_SIZE
) -> NDArray[np.float32]:
    """Draw a silhouette as the covered fraction of every pixel, [size, size] in 0..1 (supersampled)."""
    fine = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), dtype=np.uint8)
    for fill, polygon in zip((255, 0), SILHOUETTES[class_name], strict=False):
        points = (polygon * radius + np.asarray(center)) * SUPERSAMPLING - 0.5
        cv2.fillPoly(fine, [np.round(points * 16).astype(np.int32)], fill, shift=4)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One object of a scene."""

    class_name: str
    color: str
    center: tuple[float, float]
    """Pixels from the left and from the top."""
    radius: float


def render(shapes: tuple[Shape, ...], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene as an RGB image [32, 32, 3]; the ground's grey and the colours' jitter are random."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), generator.uniform(*GROUND_LEVELS), dtype=np.float32)
    for shape in shapes:
        color = np.asarray(PALETTE[shape.color]) + generator.uniform(-COLOR_JITTER, COLOR_JITTER, size=3)
        alpha = coverage(shape.class_name, shape.center, shape.radius)[..., None]
        image = image * (1 - alpha) + color.clip(0, 255).astype(np.float32) * alpha
    return np.round(image).astype(np.uint8)


def sample_scene(prompt: Prompt, generator: np.random.Generator) -> tuple[Shape, ...]:
    """Sample a scene that shows exactly what the prompt asks for; everything else is random.

    Objects of one clause share a colour. Positions are drawn by rejection: inside the image, apart from each other, and
    in the prompt's relation.
    """
    low, high = RADII_BY_TAG.get(prompt.tag, PAIR_RADII)
    wanted: list[tuple[str, str]] = []
    for clause in prompt.include:
        color = clause.color or str(generator.choice(COLORS))
        wanted += [(clause.class_name, color)] * clause.count
    while True:
        radii_TB = generator.uniform(low, high, size=(_TRIES, len(wanted)))
        margin_TB = radii_TB[..., None] + GAP
        centers_TB = generator.uniform(margin_TB, IMAGE_SIZE - margin_TB, size=(_TRIES, len(wanted), 2))
        for attempt in np.flatnonzero(_apart(centers_TB, radii_TB)):
            radii, centers = radii_TB[attempt], centers_TB[attempt]
            if _related(prompt, centers, radii):
                return tuple(
                    Shape(class_name=name, color=color, center=(float(x), float(y)), radius=float(radius))
                    for (name, color), (x, y), radius in zip(wanted, centers, radii, strict=True)
                )


def _apart(centers: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which layouts, [tries, objects, 2], keep the gap between all bounding boxes on at least one axis."""
    first, second = np.triu_indices(radii.shape[1], k=1)
    distance = np.abs(centers[:, first] - centers[:, second]).max(axis=2)
    return np.all(distance > radii[:, first] + radii[:, second] + GAP, axis=1)


def _related(prompt: Prompt, centers: NDArray[np.float64], radii: NDArray[np.float64]) -> bool:
    """Return whether every clause with a position (one object each) is in that relation."""
    boxes = np.concatenate([centers - radii[:, None], centers + radii[:, None]], axis=1)
    return all(
        clause.position is None
        or clause.position[0] in relations_between(tuple(boxes[index]), tuple(boxes[clause.position[1]]))
        for index, clause in enumerate(prompt.include)
    )
