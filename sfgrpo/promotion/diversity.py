"""Diversity of the images of one prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sfgrpo.promotion.bootstrap import Floats


def pixels(images_GHWC: NDArray[np.uint8]) -> Floats:
    """Gives the pixels of images as features in 0..1, one row for an image."""
    return images_GHWC.reshape(len(images_GHWC), -1).astype(np.float32) / 255.0


def diversity(
    images_PGHWC: NDArray[np.uint8], features: Callable[[NDArray[np.uint8]], Floats] = pixels
) -> NDArray[np.float64]:
    """Measures how far the images of every prompt lie apart: the mean distance of its G (G - 1) / 2 pairs, [P].

    The distance of two images is the root mean square difference of their features, so that in pixels it is 0 for
    copies and 1 for black and white, whatever the resolution. Pixels also count a shift as a difference; features of
    an image encoder, a function from [G, H, W, 3] to [G, D], count what the encoder sees.

    Raises:
        ValueError: the images are not [P, G, H, W, 3], or a prompt has only one.
    """
    if images_PGHWC.ndim != 5 or images_PGHWC.shape[1] < 2:
        raise ValueError(
            f"images have shape {list(images_PGHWC.shape)}; "
            "diversity takes [prompts, images, height, width, 3] with two images or more of a prompt"
        )
    return np.array([_mean_distance(features(images)) for images in images_PGHWC], dtype=np.float64)


def _mean_distance(features_GD: Floats) -> float:
    pairs = itertools.combinations(np.asarray(features_GD, dtype=np.float64), 2)
    return float(np.mean([np.sqrt(np.mean((one - other) ** 2)) for one, other in pairs]))
