"""The tar of an evaluation's images: which is which, in order, the same bytes every time."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfgrpo.tracking.image_archive import add_images
from tests.support.tiny import tiny_prompts

PROMPTS, PER_PROMPT = tiny_prompts(3), 2
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def packed(path: Path, images: NDArray[np.uint8] = IMAGES) -> bytes:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for model in ("base", "policy"):
            for first in (0, 4):
                add_images(tar, model, PROMPTS, PER_PROMPT, first, images[first : first + 4])
    return path.read_bytes()


def test_names_tell_model_prompt_task_and_image_and_are_sorted(tmp_path):
    packed(tmp_path / "images.tar")
    with tarfile.open(tmp_path / "images.tar") as tar:
        names = tar.getnames()
        assert names == sorted(names) and len(names) == 12
        assert names[3] == f"base/00001-{PROMPTS[1].tag}/001.png"
        image = tar.extractfile(names[9])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.read()))), IMAGES[3])


def test_same_images_give_the_same_bytes_and_others_do_not(tmp_path):
    first = packed(tmp_path / "first.tar")
    assert packed(tmp_path / "second.tar") == first
    assert packed(tmp_path / "third.tar", 255 - IMAGES) != first
    with tarfile.open(tmp_path / "first.tar") as tar:
        assert {(entry.mtime, entry.uid, entry.uname, entry.mode) for entry in tar} == {(0, 0, "", 0o644)}
