"""All images of an evaluation in one tar of PNG files, the same bytes for the same images."""

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
    """A tar that takes images as they are drawn, so that never more than a batch of them is held."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(
        self, model: str, prompts: Sequence[Prompt], images_per_prompt: int, first: int, images: NDArray[np.uint8]
    ) -> None:
        """Adds images [n, H, W, 3] of a model, of which `first` is the number: image g of prompt p is p * G + g.

        They are called `<model>/<position of the prompt>-<task>/<image>.png`. Given in ascending order, and models by
        the alphabet, they are sorted by name.
        """
        for number, image in enumerate(images, first):
            position, index = divmod(number, images_per_prompt)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            # ProcessIdentity, mode and time are those of TarInfo, and always the same.
            entry = tarfile.TarInfo(f"{model}/{position:05d}-{prompts[position].tag}/{index:03d}.png")
            entry.size = buffer.tell()
            buffer.seek(0)
            self._tar.addfile(entry, buffer)


@contextlib.contextmanager
def image_archive(path: Path) -> Iterator[ImageArchive]:
    """Makes a tar of images, which is whole when the block ends."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield ImageArchive(tar)
