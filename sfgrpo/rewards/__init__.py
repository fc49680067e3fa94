"""The tables of rewards by name: a new reward is one module and one line here, and its contract test runs by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfgrpo.rewards.base import Reward, WeightedReward, checked_rewards, distinct_rewards
from sfgrpo.rewards.clip import ClipReward
from sfgrpo.rewards.geneval import GenEvalReward, StrictGenEvalReward
from sfgrpo.rewards.likeness import LikenessReward
from sfgrpo.shapes.detector import detect_images

__all__ = [
    "PRETRAINED_REWARDS",
    "REWARDS",
    "Reward",
    "WeightedReward",
    "build_reward",
    "checked_rewards",
    "distinct_rewards",
]

REWARDS: dict[str, Callable[[], Reward]] = {
    "geneval": lambda: GenEvalReward(detect_images),
    "geneval_correct": lambda: StrictGenEvalReward(detect_images),
    "likeness": LikenessReward,
}
"""Rewards that stand on their own."""

PRETRAINED_REWARDS: dict[str, Callable[..., Reward]] = {
    "clip": ClipReward.from_pretrained,
}
"""Rewards with a pretrained model behind them: called with its name, `revision` and `device`."""


def build_reward(
    name: str,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Reward:
    """Makes the reward of a name, as the section `reward` of the parameters gives it.

    Raises:
        ValueError: the name is in no table, or it has a model and needs none, or needs one and has none.
    """
    if name in PRETRAINED_REWARDS:
        if pretrained is None:
            raise ValueError(
                f"reward {name!r} has no model; set reward.pretrained, for the shapes to models/shapes-clip"
            )
        return PRETRAINED_REWARDS[name](pretrained, revision=revision, device=device)
    if name not in REWARDS:
        allowed = ", ".join([*REWARDS, *PRETRAINED_REWARDS])
        raise ValueError(f"reward {name!r} is unknown; allowed are {allowed}")
    if pretrained is not None or revision is not None:
        raise ValueError(f"reward {name!r} has no model behind it; set reward.pretrained and reward.revision to null")
    return REWARDS[name]()
