"""The clipped surrogate objective, and the numbers that explain it."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Beyond e^20 a ratio says only that something broke; clamped so that it stays a number in float32."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The loss of each trained (sample, step), and its explanation in detached scalars."""

    loss: Float[Tensor, "*shape"]
    ratio_mean: Float[Tensor, ""]
    ratio_deviation: Float[Tensor, ""]
    """Largest |ratio - 1|: exactly 0 before the first optimiser step, if rollout and update agree."""
    clip_fraction: Float[Tensor, ""]
    """Share of ratios that lie outside the clip range."""
    approx_kl: Float[Tensor, ""]
    """Mean of ratio - 1 - log ratio, the estimator k3 of KL(old || new), joschu.net/blog/kl-approx.html."""


def clipped_surrogate(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    clip_range: float,
) -> PolicyLoss:
    """Gives -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A) per element, ratio = exp(log_prob - old).

    Source: PPO, eq. 7, arXiv:1707.06347. The mean over elements, and a KL penalty, are left to the caller.

    Raises ValueError if a log-prob is NaN or infinite, as that of a deterministic step is.
    """
    log_ratio = log_prob - old_log_prob
    if not bool(log_ratio.isfinite().all()):
        raise ValueError(
            f"{int((~log_ratio.isfinite()).sum())} of {log_ratio.numel()} log-ratios are NaN or infinite; leave "
            f"deterministic steps out, and compute log-probs in float32"
        )
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
    deviation = (ratio.detach() - 1).abs()
    return PolicyLoss(
        loss=loss,
        ratio_mean=ratio.detach().mean(),
        ratio_deviation=deviation.max(),
        clip_fraction=(deviation > clip_range).float().mean(),
        approx_kl=(ratio - 1 - log_ratio).detach().mean(),
    )
