"""Reproducible tar of an evaluation's images, written batch by batch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfgrpo.types import Prompt


def add_images(
    tar: tarfile.TarFile,
    model: str,
    prompts: Sequence[Prompt],
    images_per_prompt: int,
    first: int,
    images: NDArray[np.uint8],
) -> None:
    """Append images of a model to a tar as `<model>/<position of the prompt>-<task>/<image>.png`.

    Args:
        first: number of the first image; image g of prompt p has number p * G + g.
        images: [n, H, W, 3], in ascending order of their numbers.
    """
    for number, image in enumerate(images, first):
        position, index = divmod(number, images_per_prompt)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        # Owner, mode and time stay at TarInfo's constant defaults, so equal images give equal bytes.
        entry = tarfile.TarInfo(f"{model}/{position:05d}-{prompts[position].tag}/{index:03d}.png")
        entry.size = buffer.tell()
        buffer.seek(0)
        tar.addfile(entry, buffer)
