"""Many small images as tiles of one PNG, without loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfgrpo.errors import ConfigError
from sfgrpo.shapes.world import IMAGE_SIZE

TILES_PER_ROW = 24


def write_tiles(path: Path, images: NDArray[np.uint8]) -> None:
    """Write images [N, 32, 32, 3] in rows from left to right; the rest of the last row is black.

    Raises:
        ValueError: the images have another shape or type, or there are none.
    """
    if images.dtype != np.uint8 or not len(images) or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    rows = math.ceil(len(images) / TILES_PER_ROW)
    tiles = np.zeros((rows * TILES_PER_ROW, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    tiles[: len(images)] = images
    mosaic = tiles.reshape(rows, TILES_PER_ROW, IMAGE_SIZE, IMAGE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    side = TILES_PER_ROW * IMAGE_SIZE
    Image.fromarray(mosaic.reshape(rows * IMAGE_SIZE, side, 3)).save(path, optimize=True)


def read_tiles(path: Path, num_images: int, cure: str) -> NDArray[np.uint8]:
    """Read the first `num_images` tiles: [N, 32, 32, 3].

    Raises:
        ConfigError: the file cannot be read, where `cure` says what to do, or holds the tiles of another number.
    """
    try:
        with Image.open(path) as mosaic:
            pixels = np.asarray(mosaic.convert("RGB"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {cure}") from error
    rows, columns = (side // IMAGE_SIZE for side in pixels.shape[:2])
    tiles = pixels[: rows * IMAGE_SIZE, : columns * IMAGE_SIZE].reshape(rows, IMAGE_SIZE, columns, IMAGE_SIZE, 3)
    if rows * columns < num_images or rows * columns >= num_images + TILES_PER_ROW:
        raise ConfigError(f"{path}: holds {rows * columns} tiles for {num_images} images; {cure}")
    return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)[:num_images]
