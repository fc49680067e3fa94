"""Noise addressed by what it is for, so that no result depends on call order, batch size or rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def gaussian_noise(
    seed: int, stream: str, update_index: int, image_indices: Iterable[int], shape: tuple[int, ...]
) -> Tensor:
    """Draw standard normal noise [N, *shape] in float32 on the CPU, one independent block for each image index.

    An image gets the same block whatever the other images, their order and the rank. Each block is a Philox stream
    with a key of 128 bits, which rules collisions out.
    """
    blocks = [
        np.random.Generator(np.random.Philox(key=_key(seed, stream, update_index, index))).standard_normal(
            shape, dtype=np.float32
        )
        for index in image_indices
    ]
    return torch.from_numpy(np.stack(blocks)) if blocks else torch.empty(0, *shape)


def _key(*address: int | str) -> int:
    """Hash an address to 128 bits; as JSON, since ("a", 11) and ("a1", 1) must differ."""
    return int.from_bytes(hashlib.sha256(json.dumps(address).encode()).digest()[:16], "big")
