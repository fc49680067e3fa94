"""The reward contract: images and prompts in, one number per image out, and the checks of it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.errors import RewardError
from sfgrpo.geneval.metadata import shown
from sfgrpo.types import Prompt


class Reward(abc.ABC):
    """A score of images for their prompts, each independent of the other images of the call."""

    name: str
    """Name of the reward in the configuration and in metrics."""

    @abc.abstractmethod
    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        """Score RGB images [N, H, W, 3] for their N prompts: float32 [N] on the CPU, higher is better."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `ValueError` if images cannot be scored for this prompt; by default they can for every one.

        It is called before a training or an evaluation starts.
        """
        return

    def seen(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[int | None]:
        """Return for RGB images [N, H, W, 3] how many objects of the class that a counting prompt asks for they show.

        None for prompts of other tasks and, by default, for all of them: only what detects objects can count them.
        """
        return [None] * len(images)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Classes and colours that a reward can tell from others."""

    classes: Collection[str]
    colors: Collection[str]

    def check_prompt(self, reward: str, prompt: Prompt) -> None:
        """Raise `ValueError` if a prompt names a class or a colour that the reward of this name does not know."""
        for clause in (*prompt.include, *prompt.exclude):
            for kind, name, known in (
                ("class", clause.class_name, self.classes),
                ("colour", clause.color, self.colors),
            ):
                if name is not None and name not in known:
                    raise ValueError(
                        f"reward {reward} knows no {kind} {shown(name)}; it knows {', '.join(known)}, so reword the "
                        "prompt, or use another reward"
                    )


def checked_rewards(reward: Reward, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
    """Call a reward on images [N, H, W, 3] and require one finite float32 number for each.

    Raises:
        ValueError: there is not one prompt for every image.
        RewardError: the reward raised (chained), or returned a wrong shape or type or a number that is not finite.
    """
    rewards = raw_rewards(reward, images, prompts)
    broken = torch.nonzero(~torch.isfinite(rewards)).flatten().tolist()
    if broken:
        index = broken[0]
        raise RewardError(
            f"reward {reward.name} gave {rewards[index].item()} for image {index} ({prompts[index].text!r}) "
            f"and is not finite for {len(broken)} of {len(images)} images"
        )
    return rewards


def raw_rewards(reward: Reward, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
    """Call a reward as `checked_rewards` does, but let NaN and infinity pass: a training can go on without them."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts; give one prompt for every image")
    try:
        rewards = reward(images, prompts)
    except RewardError:
        raise
    except Exception as error:
        index = _first_failure(reward, images, prompts)
        where = "the batch as a whole" if index is None else f"image {index} ({prompts[index].text!r})"
        raise RewardError(f"reward {reward.name} failed on {where}: {error}") from error
    if rewards.shape != (len(images),) or rewards.dtype != torch.float32:
        raise RewardError(
            f"reward {reward.name} gave {list(rewards.shape)} {rewards.dtype} for {len(images)} images from "
            f"{[prompt.text for prompt in prompts[:1]]} on; it must give [{len(images)}] torch.float32"
        )
    return rewards


def distinct_rewards(*rewards: Reward) -> tuple[Reward, ...]:
    """Return the rewards without those whose name came before."""
    return tuple({reward.name: reward for reward in reversed(rewards)}.values())[::-1]


def _first_failure(reward: Reward, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> int | None:
    """Return the first image that the reward fails on alone, for the error message."""
    for index in range(len(images)):
        try:
            reward(images[index : index + 1], prompts[index : index + 1])
        except Exception:
            return index
    return None
