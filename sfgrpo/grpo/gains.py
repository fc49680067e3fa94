"""Gains: what each step added to the reward."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def step_gains(rewards_NS: Float[Tensor, "N S"]) -> Float[Tensor, "N K"]:
    """Return g_k = r_{k+1} - r_k for every step; the gains of a trajectory sum to r_K - r_0.

    Source: Stepwise-Flow-GRPO, arXiv:2603.28718, where the gain reads r_{t-1} - r_t because t counts down from noise
    to image. Our states count up, and this is the same difference: later state minus earlier state.
    """
    return rewards_NS[:, 1:] - rewards_NS[:, :-1]


def decayed_gains(gains_NK: Float[Tensor, "N K"], gae_lambda: float) -> Float[Tensor, "N K"]:
    """Return sum_j lambda^j g_{k+j}: generalised advantage estimation with the reward of the clean estimate as value.

    0 leaves the gains as they are; 1 gives r_K - r_k, the final reward less a baseline of the state. Values between
    trade the bias of the estimate for the variance of all later steps.
    Source: Schulman et al., arXiv:1506.02438, with discount 1.
    """
    credit = gains_NK.clone()
    for k in reversed(range(gains_NK.shape[1] - 1)):
        credit[:, k] += gae_lambda * credit[:, k + 1]
    return credit
