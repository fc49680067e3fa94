"""The clipped surrogate objective, and its diagnostics."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to it, so that the ratio stays finite in float32; beyond e^20 something is broken anyway."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The loss of each trained (sample, step), and its diagnostics, one detached number for each as well."""

    loss: Float[Tensor, "*shape"]
    ratio: Float[Tensor, "*shape"]
    deviation: Float[Tensor, "*shape"]
    """|ratio - 1|: exactly 0 before the first optimiser step, if rollout and update agree."""
    clipped: Float[Tensor, "*shape"]
    """1 where the ratio lies outside the clip range, else 0."""
    approx_kl: Float[Tensor, "*shape"]
    """ratio - 1 - log ratio, the estimator k3 of KL(old || new), joschu.net/blog/kl-approx.html."""


def clipped_surrogate(
    log_prob: Float[Tensor, "*shape"],
    old_log_prob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    clip_range: float,
) -> PolicyLoss:
    """Return -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A) per element, ratio = exp(log_prob - old).

    Source: PPO, eq. 7, arXiv:1707.06347. The mean over elements, and a KL penalty, are left to the caller.
    An element whose log-ratio is NaN or infinite becomes NaN in all results and changes no other element.
    """
    log_ratio = log_prob - old_log_prob
    # Before the clamp, which would turn infinity into an ordinary number.
    log_ratio = log_ratio.where(log_ratio.isfinite(), torch.nan).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
    deviation = (ratio.detach() - 1).abs()
    return PolicyLoss(
        loss=loss,
        ratio=ratio.detach(),
        deviation=deviation,
        clipped=(deviation > clip_range).to(deviation).where(deviation.isfinite(), torch.nan),
        approx_kl=(ratio - 1 - log_ratio).detach(),
    )
