"""Advantages of steps: stepwise gains, or the final reward, normalised within groups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfgrpo.grpo.gains import decayed_gains, step_gains
from sfgrpo.types import Credit, StdScope

# Dimensions of the credit [P, G, K] over which the mean, then the std, is taken.
NORMALISED_DIMS: dict[Credit, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "joint": ((1, 2), (1, 2)),
    "per_step": ((1,), (1,)),
    "step_mean": ((1,), (1, 2)),
    "terminal": ((1, 2), (1, 2)),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """The advantage of every step, and which samples have nothing to learn from."""

    values_NK: Float[Tensor, "N K"]
    constant_N: Bool[Tensor, " N"]
    """True for the members of a group of equal credits: their advantages are exactly 0, and they need no update."""


def group_advantages(
    rewards_NS: Float[Tensor, "N S"],
    *,
    group_size: int,
    states: Sequence[int],
    credit: Credit,
    std: StdScope,
    clip: float,
    gae_lambda: float = 0.0,
    eps: float = 1e-4,
) -> Advantages:
    """Normalise the credit c of each step within its group, (c - mean) / (std + eps), and clip it to +-clip.

    A group is `group_size` neighbouring rows, whatever their prompts. Std is the population's.

    `joint`     gains; one mean and one std over all steps of the group. Stepwise-Flow-GRPO, arXiv:2603.28718
    `per_step`  gains; a mean and a std per step. An ablation of the paper, and slower there
    `step_mean` gains; a mean per step, and the std of `joint`. Not in the paper
    `terminal`  final reward; one mean and std, the same number on every step. Flow-GRPO, arXiv:2505.05470

    Steps between two scored states share the gain between them.

    Args:
        rewards_NS: reward of every scored state, the image's last.
        states: indices of these states, ascending from 0 to K; under `terminal` K alone is enough.
        std: `group` as above, or `global` for the std (not the mean) over all groups of the batch.
        gae_lambda: share of the later gains in a step's own, see `decayed_gains`; no effect under `terminal`.
        eps: 1e-4, as in Flow-GRPO's code; in units of the reward.
    """
    _check_rewards(rewards_NS, group_size, states, credit)
    if credit == "terminal":
        credit_NK, lengths = rewards_NS[:, -1:], [states[-1]]
    else:
        credit_NK = decayed_gains(step_gains(rewards_NS), gae_lambda)
        lengths = [later - earlier for earlier, later in itertools.pairwise(states)]
    credit_PGK = credit_NK.reshape(-1, group_size, credit_NK.shape[1])
    mean_dims, std_dims = NORMALISED_DIMS[credit]
    if std == "global":
        std_dims = (0, *std_dims)
    # The mean of equal numbers may round to another number, and divided by a small eps that would be an advantage.
    constant = credit_PGK.amax(mean_dims, keepdim=True) == credit_PGK.amin(mean_dims, keepdim=True)
    centred = (credit_PGK - credit_PGK.mean(mean_dims, keepdim=True)).masked_fill(constant, 0)
    scale = credit_PGK.std(std_dims, correction=0, keepdim=True)
    values_PGK = (centred / (scale + eps)).clamp(-clip, clip)
    return Advantages(
        values_NK=values_PGK.flatten(0, 1).repeat_interleave(torch.tensor(lengths, device=scale.device), dim=1),
        constant_N=constant.flatten(1).all(dim=1).repeat_interleave(group_size),
    )


def _check_rewards(rewards_NS: Tensor, group_size: int, states: Sequence[int], credit: Credit) -> None:
    num_samples, num_states = rewards_NS.shape
    if num_samples % group_size:
        raise ValueError(
            f"{num_samples} samples do not split into groups of {group_size}; pass whole groups, one after the other"
        )
    if num_states != len(states):
        raise ValueError(f"rewards of {num_states} states were given for the {len(states)} states {list(states)}")
    if credit != "terminal" and (states[0] != 0 or len(states) < 2):
        raise ValueError(f"states {list(states)} leave steps without a gain under credit {credit}; start them at 0")
    broken = (~rewards_NS.isfinite()).nonzero().tolist()
    if broken:
        raise ValueError(
            f"{len(broken)} of {rewards_NS.numel()} rewards are NaN or infinite, the first at [sample, state] "
            f"{broken[0]}; the reward must give a number for every image"
        )
