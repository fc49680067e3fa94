"""Rewards by name: a new one is a module and a line in a table here, and its contract test runs by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfgrpo.geneval.scorer import is_correct
from sfgrpo.rewards.base import Reward, Vocabulary, checked_rewards, distinct_rewards
from sfgrpo.rewards.clip import ClipReward
from sfgrpo.rewards.confirmed import ConfirmedVerdict
from sfgrpo.rewards.geneval import GenEvalReward, soft_credit
from sfgrpo.rewards.likeness import LikenessReward
from sfgrpo.shapes.counter import count_objects
from sfgrpo.shapes.detector import detect_images
from sfgrpo.shapes.world import CLASSES, COLORS

__all__ = [
    "PRETRAINED_REWARDS",
    "REWARDS",
    "Reward",
    "build_reward",
    "check_reward",
    "checked_rewards",
    "confirmation_of",
    "distinct_rewards",
]

SHAPES = Vocabulary(classes=CLASSES, colors=COLORS)
"""What the detector of the shapes world can tell apart."""

REWARDS: dict[str, Callable[[], Reward]] = {
    "geneval": lambda: GenEvalReward("geneval", soft_credit, detect_images, SHAPES),
    "geneval_correct": lambda: GenEvalReward("geneval_correct", is_correct, detect_images, SHAPES),
    "likeness": LikenessReward,
}
"""Rewards without a pretrained model."""

PRETRAINED_REWARDS: dict[str, Callable[..., Reward]] = {"clip": ClipReward.from_pretrained}
"""Rewards with a pretrained model: called with its name, `revision` and `device`."""

CONFIRMED_VERDICTS: dict[str, Callable[[], Reward]] = {
    "geneval_correct": lambda: ConfirmedVerdict("geneval_confirmed", detect_images, count_objects, SHAPES)
}
"""Verdicts that a second opinion confirms, by the name of the plain verdict; nothing to train on.

A detector of another world brings a line of its own, with a counter that works by other cues.
"""

RENAMED = {"geneval_strict": "geneval_correct"}
"""Former names, and what to write instead."""


def build_reward(
    name: str, *, pretrained: str | None = None, revision: str | None = None, device: str | torch.device = "cpu"
) -> Reward:
    """Return the reward of a name, as in the section `reward` of the parameters.

    Raises:
        ValueError: the name is unknown, or the reward lacks its model, or has one that it does not need.
    """
    check_reward(name, pretrained=pretrained, revision=revision)
    if name in PRETRAINED_REWARDS:
        return PRETRAINED_REWARDS[name](pretrained, revision=revision, device=device)
    return REWARDS[name]()


def check_reward(name: str, *, pretrained: str | None, revision: str | None) -> None:
    """Raise `ValueError` if the name is unknown, or the reward lacks its model, or has one that it does not need."""
    if name in PRETRAINED_REWARDS:
        if pretrained is None:
            raise ValueError(
                f"reward {name!r} needs a model; set reward.pretrained, for the shapes to models/shapes-clip"
            )
        return
    if name in RENAMED:
        raise ValueError(f"reward {name!r} is now called {RENAMED[name]!r}; write that instead")
    if name not in REWARDS:
        allowed = ", ".join([*REWARDS, *PRETRAINED_REWARDS])
        raise ValueError(f"reward {name!r} is unknown; allowed are {allowed}")
    if pretrained is not None or revision is not None:
        raise ValueError(f"reward {name!r} takes no model; set reward.pretrained and reward.revision to null")


def confirmation_of(verdict: str) -> Reward | None:
    """Return the reward that confirms a verdict of this name by an independent counter; None if there is no counter."""
    return CONFIRMED_VERDICTS[verdict]() if verdict in CONFIRMED_VERDICTS else None
