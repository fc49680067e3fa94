"""Reproducible tar of all images of an evaluation, as PNG files."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfgrpo.types import Prompt


class ImageArchive:
    """A tar that is written batch by batch, so that no more than a batch of images is in memory."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(
        self, model: str, prompts: Sequence[Prompt], images_per_prompt: int, first: int, images: NDArray[np.uint8]
    ) -> None:
        """Append images of a model as `<model>/<position of the prompt>-<task>/<image>.png`.

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
            self._tar.addfile(entry, buffer)


@contextlib.contextmanager
def image_archive(path: Path) -> Iterator[ImageArchive]:
    """Create a tar of images, complete when the block ends."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield ImageArchive(tar)
