"""Spatial relations of two boxes, by GenEval's rule."""

from __future__ import annotations

import math

from sfgrpo.types import Box, Relation

SLACK = 0.1
"""Share of the two boxes' summed extent that an offset must exceed before it counts."""


def relations_between(box: Box, target: Box) -> set[Relation]:
    """Return the relations of `box` to `target`: none, one, or two on a diagonal (GenEval, evaluate_images.py).

    The offset between the centres is shortened by a tenth of the summed extents per axis, then divided by its norm
    before that; a component beyond one half in absolute value is a relation. y grows downward.
    """
    offset = [(box[axis] + box[axis + 2] - target[axis] - target[axis + 2]) / 2 for axis in (0, 1)]
    extent = [box[axis + 2] - box[axis] + target[axis + 2] - target[axis] for axis in (0, 1)]
    revised = [math.copysign(max(abs(o) - SLACK * e, 0.0), o) for o, e in zip(offset, extent, strict=True)]
    if all(abs(r) < 1e-3 for r in revised):
        return set()
    norm = math.hypot(*offset)
    dx, dy = revised[0] / norm, revised[1] / norm
    wanted: tuple[tuple[Relation, bool], ...] = (
        ("left of", dx < -0.5),
        ("right of", dx > 0.5),
        ("above", dy < -0.5),
        ("below", dy > 0.5),
    )
    return {relation for relation, holds in wanted if holds}
