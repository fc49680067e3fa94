"""Numbers that are not finite: kept away from the optimiser, counted, and written down with their prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfgrpo.errors import NumericsError
from sfgrpo.types import Prompt, Trajectory

NUM_NAMED = 3
"""Prompts that the error names; the file has them all."""


def broken_images(trajectory: Trajectory) -> Tensor:
    """Tells of every image whether a latent or velocity on its way is NaN or infinite: [N], on the CPU.

    Its picture then means nothing, though it may well get a reward.
    """
    parts = (trajectory.latents_NSCHW, trajectory.velocities_NKCHW)
    return torch.stack([~part.flatten(1).isfinite().all(dim=1) for part in parts]).any(dim=0).cpu()


def without_broken_groups(rewards_NS: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Makes constant every group that has a reward which is NaN or infinite, so that nothing is learnt from it.

    The constant is the mean reward of the images of the other groups, which disturbs means and spreads the least.

    Args:
        rewards_NS: rewards of whole groups, the last state being the image.
        group_size: images of a group, which are neighbours.

    Returns:
        The rewards, all finite, and whether an image had one that was not, [N].
    """
    broken_N = ~rewards_NS.isfinite().all(dim=1)
    member_N = broken_N.reshape(-1, group_size).any(dim=1).repeat_interleave(group_size)
    others = rewards_NS[~member_N, -1]
    constant = float(others.mean()) if len(others) else 0.0
    return rewards_NS.masked_fill(member_N[:, None], constant), broken_N


class NumericalGuard:
    """Counts the updates in which something was not finite, and stops a run that has too many of them.

    All processes must record the same, so that all stop together; one of them writes.
    """

    def __init__(self, limit: int, path: Path, *, count: int = 0, writes: bool = True) -> None:
        """Takes `update.max_broken_updates`, the file to write, and the updates that were counted before a resume."""
        self.count = count
        self._limit, self._path, self._writes = limit, path, writes
        self._last: int | None = None

    def record(self, update_index: int, kind: str, prompts: Sequence[Prompt]) -> None:
        """Notes the prompts of the images whose `kind` (reward, loss, gradient) is not finite, if there are any.

        An update counts once, however much of it is broken.

        Raises:
            NumericsError: more updates than the limit are broken.
        """
        if not prompts:
            return
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                for prompt in prompts:
                    print(json.dumps({"update": update_index, "kind": kind, "prompt": prompt.text}), file=file)
        self.count += self._last != update_index
        self._last = update_index
        if self.count > self._limit:
            texts = list(dict.fromkeys(prompt.text for prompt in prompts))
            raise NumericsError(
                f"{self.count} updates had a reward, loss or gradient that is not finite, more than "
                f"update.max_broken_updates = {self._limit}, the last of them a {kind} of "
                f"{', '.join(map(repr, texts[:NUM_NAMED]))}; lower update.learning_rate or mend the reward, and see "
                f"{self._path} for all prompts"
            )
