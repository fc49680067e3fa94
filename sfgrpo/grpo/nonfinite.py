"""Numbers that are not finite: kept from the optimiser, counted, and written to a file with their prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfgrpo.errors import NumericsError
from sfgrpo.types import Prompt, Trajectory

NUM_NAMED = 3
"""Prompts in the error message; the file has all of them."""


def broken_images(trajectory: Trajectory) -> Tensor:
    """Return which images have a latent or velocity that is NaN or infinite, [N] on the CPU.

    The decoded image may still get a finite reward, but it means nothing.
    """
    parts = (trajectory.latents_NSCHW, trajectory.velocities_NKCHW)
    return torch.stack([~part.flatten(1).isfinite().all(dim=1) for part in parts]).any(dim=0).cpu()


def without_broken_groups(rewards_NS: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Make every group with a NaN or infinite reward constant, so that nothing is learnt from it.

    The constant is the mean reward of the images of the other groups, which changes means and spreads the least.
    `rewards_NS` are the rewards of whole groups, neighbours of each other, the image's last.

    Returns:
        The rewards, all finite, and which images had one that was not, [N].
    """
    broken_N = ~rewards_NS.isfinite().all(dim=1)
    member_N = broken_N.reshape(-1, group_size).any(dim=1).repeat_interleave(group_size)
    others = rewards_NS[~member_N, -1]
    constant = float(others.mean()) if len(others) else 0.0
    return rewards_NS.masked_fill(member_N[:, None], constant), broken_N


class NumericalGuard:
    """Counter of the updates in which something was not finite; stops a run that has too many of them.

    All processes must record the same, so that they stop together; one of them writes the file.
    """

    def __init__(self, limit: int, path: Path, *, count: int = 0, writes: bool = True) -> None:
        """Take `update.max_broken_updates`, the file to write, and the count before a resume."""
        self.count = count
        self._limit, self._path, self._writes = limit, path, writes
        self._last: int | None = None

    def record(self, update_index: int, kind: str, prompts: Sequence[Prompt]) -> None:
        """Write down the prompts of images whose `kind` (reward, loss, gradient) is not finite; an update counts once.

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
                f"{', '.join(map(repr, texts[:NUM_NAMED]))}; lower update.learning_rate or fix the reward, and see "
                f"{self._path} for all prompts"
            )
