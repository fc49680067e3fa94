"""GenEval as a reward, for any detector: a smooth partial credit, and the official verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.geneval.relations import relations_between
from sfgrpo.geneval.scorer import count_seen
from sfgrpo.rewards.base import Reward, Vocabulary
from sfgrpo.types import Clause, Detection, Prompt

Detector = Callable[[NDArray[np.uint8]], list[list[Detection]]]
"""Finds the objects of RGB images [N, H, W, 3]: one list of detections for every image, scores in 0..1."""


def soft_credit(prompt: Prompt, detections: Sequence[Detection]) -> float:
    """Return partial credit in 0..1 that changes with every detection's score: the mean of all clauses' parts.

    With n the count that a clause asks for, a = score * quality of a detection of its class, e = sum of a of the n
    best of these minus the sum of the scores of all others, and clamp to 0..1:

        count     clamp(e / n)
        colour    present * (sum of a of the right colour) / (sum of a)
        relation  present * present of the target * (sum of a a' of the pairs in relation) / (sum of a a')

    where present = clamp(1 - n + e) is 1 for the exact count and 0 when a whole object is missing or too many. There
    is no score threshold, so a clearer object pays before GenEval would count it. An object too many costs its score
    whatever its quality, so that drawing it badly hides nothing. With scores of 0 and 1 only and full quality, the
    value is the mean of Flow-GRPO's parts, each clamped.

    Differs: from the score of Flow-GRPO's reward server in four points. Parts are clamped: there
    sixteen dogs for one are worth -14. Scores count in full instead of by a threshold. A wrong relation is worth 0,
    while there 0 and 1 are both appended, so that the wrong side costs a quarter and not a third. A clause that names
    both a colour and a relation is paid for its relation even when the colour is wrong; no GenEval prompt has one.
    """
    parts: list[float] = []
    for clause in prompt.include:
        found = _of(clause, detections)
        parts.append(_clamp(_earned(clause, found) / clause.count))
        if clause.color is not None:
            right = sum(_amount(detection) for detection in found if detection.color == clause.color)
            parts.append(_present(clause, found) * _ratio(right, sum(map(_amount, found))))
        if clause.position is not None:
            parts.append(_relation_part(clause, found, prompt.include[clause.position[1]], detections))
    return sum(parts) / len(parts)


class GenEvalReward(Reward):
    """A score of what a detector finds: `soft_credit`, the training reward, or `is_correct`, the official verdict."""

    def __init__(
        self,
        name: str,
        score: Callable[[Prompt, Sequence[Detection]], float],
        detector: Detector,
        vocabulary: Vocabulary,
    ) -> None:
        """Take the reward's name, the score of a prompt and its detections, and the detector with what it knows."""
        self.name, self._score, self._detector, self._vocabulary = name, score, detector, vocabulary

    def check_prompt(self, prompt: Prompt) -> None:
        self._vocabulary.check_prompt(self.name, prompt)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        scores = [self._score(*pair) for pair in zip(prompts, self._detector(images), strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def seen(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[int | None]:
        counted = [index for index, prompt in enumerate(prompts) if prompt.tag == "counting"]
        numbers: list[int | None] = [None] * len(prompts)
        for index, found in zip(counted, self._detector(images[counted]) if counted else (), strict=True):
            numbers[index] = count_seen(prompts[index], found)
        return numbers


def _of(clause: Clause, detections: Sequence[Detection]) -> list[Detection]:
    return [detection for detection in detections if detection.class_name == clause.class_name]


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def _amount(detection: Detection) -> float:
    return detection.score * detection.quality


def _earned(clause: Clause, found: Sequence[Detection]) -> float:
    """Return the amounts of the best detections, as many as the clause asks for, less the scores of all others."""
    best_first = sorted(found, key=_amount, reverse=True)
    asked, others = best_first[: clause.count], best_first[clause.count :]
    return sum(map(_amount, asked)) - sum(detection.score for detection in others)


def _present(clause: Clause, found: Sequence[Detection]) -> float:
    return _clamp(1.0 - clause.count + _earned(clause, found))


def _relation_part(
    clause: Clause, found: Sequence[Detection], target: Clause, detections: Sequence[Detection]
) -> float:
    assert clause.position is not None, "only clauses with a position have a relation part"
    others = _of(target, detections)
    weights = [(_amount(one) * _amount(other), one.box, other.box) for one in found for other in others]
    held = sum(weight for weight, box, other in weights if clause.position[0] in relations_between(box, other))
    total = sum(weight for weight, _, _ in weights)
    return _present(clause, found) * _present(target, others) * _ratio(held, total)
