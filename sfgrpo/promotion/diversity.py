"""Diversity of the images of one prompt."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray


def diversity(images_PGHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean distance of the G (G - 1) / 2 pairs of images of every prompt, [P].

    The distance of two images is the root mean square difference of their pixels in 0..1: 0 for copies and 1 for black
    and white, whatever the resolution. It also counts a shift as a difference.

    Raises:
        ValueError: The images are not [P, G, H, W, 3], or a prompt has only one.
    """
    if images_PGHWC.ndim != 5 or images_PGHWC.shape[1] < 2:
        raise ValueError(
            f"images have shape {list(images_PGHWC.shape)}; "
            "diversity takes [prompts, images, height, width, 3] with two images or more of a prompt"
        )
    return np.array([_mean_distance(images_GHWC) for images_GHWC in images_PGHWC], dtype=np.float64)


def _mean_distance(images_GHWC: NDArray[np.uint8]) -> float:
    # Rounded to float32 first, as in the recorded comparisons.
    pixels_GD = images_GHWC.reshape(len(images_GHWC), -1).astype(np.float32) / 255.0
    pairs = itertools.combinations(pixels_GD.astype(np.float64), 2)
    return float(np.mean([np.sqrt(np.mean((one - other) ** 2)) for one, other in pairs]))
