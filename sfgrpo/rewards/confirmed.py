"""GenEval's verdict with a second opinion: where a prompt asks for a number, a counter must see that many objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.geneval.scorer import asks_for_a_number, count_all, is_correct
from sfgrpo.rewards.base import Reward, Vocabulary
from sfgrpo.rewards.geneval import Detector
from sfgrpo.types import Prompt

Counter = Callable[[NDArray[np.uint8]], NDArray[np.integer[Any]]]
"""Counts the visible objects of RGB images [N, H, W, 3], whatever their class and quality: [N].

It must share neither cues nor thresholds with the detector whose verdicts it confirms, and no policy may train on it.
"""


class ConfirmedVerdict(Reward):
    """1 for an image that GenEval calls correct and whose number of objects a counter confirms, else 0.

    The counter is asked only where the prompt asks for a number, `asks_for_a_number`. It must see as many objects as
    the detector counts over all classes at GenEval's threshold of such prompts: three triangles and a heart are correct
    for "three triangles" and confirmed, while three triangles beside a fourth that the detector does not count are not.
    """

    def __init__(self, name: str, detector: Detector, counter: Counter, vocabulary: Vocabulary) -> None:
        """Take the reward's name, the detector of the verdict with what it knows, and the counter."""
        self.name, self._detector, self._counter, self._vocabulary = name, detector, counter, vocabulary

    def check_prompt(self, prompt: Prompt) -> None:
        self._vocabulary.check_prompt(self.name, prompt)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        confirmed = [
            is_correct(prompt, found) and (not asks_for_a_number(prompt) or count_all(prompt, found) == number)
            for prompt, found, number in zip(prompts, self._detector(images), self._counter(images), strict=True)
        ]
        return torch.tensor(confirmed, dtype=torch.float32)
