"""The sigmas of a run: a shifted grid from 1 (pure noise) to 0 (image)."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""Resolution of the time axis that SD3 was trained on; its reciprocal, shifted, is the lowest sigma before 0."""


def shifted_sigmas(num_steps: int, shift: float) -> Float32[Tensor, " S"]:
    """Lays num_steps + 1 sigmas from 1 to 0, moved towards noise by s -> shift s / (1 + (shift - 1) s).

    Source: FlowMatchEulerDiscreteScheduler of diffusers as StableDiffusion3Pipeline uses it; the shift is that of
    Esser et al., eq. 23, arXiv:2403.03206. The shift is applied twice, to the end of the grid and to the grid itself:
    the lowest sigma before the closing 0 is the twice shifted 1/1000.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} gives no schedule; use at least 1")
    if shift <= 0:
        raise ValueError(f"shift {shift} is not positive; use 1 for an even grid, or 3 as SD3 does")
    # diffusers lays the grid in float64 and rounds once, at the end.
    lowest = _shift(torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64), shift).item()
    sigmas = _shift(torch.linspace(1, lowest, num_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def _shift(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)
