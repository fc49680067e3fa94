"""How tests compare states: bit for bit, or by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(one: Any, other: Any) -> None:
    """Compare nested values with their types, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other or (one != one and other != other)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the Euclidean distance of two sets of weights."""
    return float(torch.cat([(first[name] - second[name]).flatten() for name in first]).norm())
