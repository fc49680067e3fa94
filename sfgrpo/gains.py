"""What each step added to the reward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def step_gains(rewards_NS: Float[Tensor, "N S"]) -> Float[Tensor, "N K"]:
    """Gives g_k = r_{k+1} - r_k for every step; the gains of a trajectory sum to r_K - r_0.

    Source: Stepwise-Flow-GRPO, arXiv:2603.28718, where the gain reads r_{t-1} - r_t because t counts down from noise
    to image. Our states count up, and this is the same difference: later state minus earlier state.
    """
    return rewards_NS[:, 1:] - rewards_NS[:, :-1]
