"""The table of rewards by name: a new reward is one module and one line here, and its contract test runs by itself."""

from __future__ import annotations

from collections.abc import Callable

from sfgrpo.rewards.base import Reward, WeightedReward, checked_rewards, distinct_rewards
from sfgrpo.rewards.geneval import GenEvalReward, StrictGenEvalReward
from sfgrpo.rewards.likeness import LikenessReward
from sfgrpo.shapes.detector import detect_images

__all__ = ["REWARDS", "Reward", "WeightedReward", "build_reward", "checked_rewards", "distinct_rewards"]

REWARDS: dict[str, Callable[[], Reward]] = {
    "geneval": lambda: GenEvalReward(detect_images),
    "geneval_strict": lambda: StrictGenEvalReward(detect_images),
    "likeness": LikenessReward,
}


def build_reward(name: str) -> Reward:
    """Makes the reward of a name, as `reward.name` in the parameters gives it.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown; allowed are {', '.join(REWARDS)}")
    return REWARDS[name]()
