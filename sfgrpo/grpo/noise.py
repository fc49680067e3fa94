"""Random streams addressed by what they are for, so that no result depends on call order, batch size or rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def generator_for(seed: int, stream: str, *counters: int) -> torch.Generator:
    """Makes the CPU generator of one address, say `generator_for(seed, "shuffle", update_index)`.

    torch keeps 32 bits of a CPU generator's seed, so among M addresses two share their numbers with probability
    M^2 / 2^33. For noise, of which a run needs many thousands, take `gaussian_noise`.
    """
    return torch.Generator().manual_seed(_key(seed, stream, *counters) & 0xFFFF_FFFF)


def gaussian_noise(
    seed: int, stream: str, update_index: int, image_indices: Iterable[int], shape: tuple[int, ...]
) -> Tensor:
    """Draws standard normal noise [N, *shape] in float32 on the CPU, one independent block for each image index.

    An image gets the same block whatever the other images, their order and the rank. Each block is a Philox stream
    with a key of 128 bits, which makes a collision out of the question.
    """
    blocks = [
        np.random.Generator(np.random.Philox(key=_key(seed, stream, update_index, index))).standard_normal(
            shape, dtype=np.float32
        )
        for index in image_indices
    ]
    return torch.from_numpy(np.stack(blocks)) if blocks else torch.empty(0, *shape)


def _key(*address: int | str) -> int:
    """Hashes an address to 128 bits; as JSON, since ("a", 11) and ("a1", 1) must differ."""
    return int.from_bytes(hashlib.sha256(json.dumps(address).encode()).digest()[:16], "big")
