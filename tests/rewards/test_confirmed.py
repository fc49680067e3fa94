"""A verdict with a second opinion: which images a counter confirms."""

from __future__ import annotations

import numpy as np
import pytest

from sfgrpo.geneval.grammar import counting, two_object
from sfgrpo.geneval.scorer import asks_for_a_number
from sfgrpo.rewards import CONFIRMED_VERDICTS, REWARDS, build_reward, checked_rewards, confirmation_of
from sfgrpo.rewards.base import Vocabulary
from sfgrpo.rewards.confirmed import ConfirmedVerdict
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import render, sample_scene
from sfgrpo.types import Detection, Prompt

THREE_TRIANGLES = counting("triangle", 3)
ANYTHING = Vocabulary(classes=("triangle", "heart"), colors=())


def found(*scores: float, class_name: str = "triangle") -> list[Detection]:
    return [Detection(class_name=class_name, box=(0.0, 0.0, 1.0, 1.0), score=score) for score in scores]


def confirmed(prompt: Prompt, detections: list[Detection], number: int) -> bool:
    """Return whether an image is confirmed in which the detector finds `detections`, and the counter `number`."""
    reward = ConfirmedVerdict("test", lambda images: [detections], lambda images: np.array([number]), ANYTHING)
    return bool(checked_rewards(reward, np.zeros((1, 4, 4, 3), dtype=np.uint8), [prompt])[0])


def test_as_many_objects_as_the_detector_counts_are_confirmed():
    assert confirmed(THREE_TRIANGLES, found(0.95, 0.96, 0.97), 3)


def test_object_that_the_detector_does_not_count_is_disputed():
    assert not confirmed(THREE_TRIANGLES, found(0.95, 0.96, 0.97, 0.8), 4)


def test_object_that_the_counter_does_not_see_is_disputed():
    assert not confirmed(THREE_TRIANGLES, found(0.95, 0.96, 0.97), 2)


def test_object_of_another_class_that_the_detector_counts_is_confirmed():
    detections = [*found(0.95, 0.96, 0.97), *found(0.95, class_name="heart")]
    assert confirmed(THREE_TRIANGLES, detections, 4)
    assert not confirmed(THREE_TRIANGLES, detections, 5)


def test_wrong_number_is_not_confirmed_though_both_agree():
    assert not confirmed(THREE_TRIANGLES, found(0.95, 0.96), 2)


def test_counter_is_asked_only_where_a_prompt_asks_for_a_number():
    pair = two_object("triangle", "heart")
    assert confirmed(pair, [*found(0.95), *found(0.95, class_name="heart")], 7)
    space = all_prompts()
    assert {tag for tag, prompts in space.items() if any(map(asks_for_a_number, prompts))} == {"counting"}
    assert all(map(asks_for_a_number, space["counting"]))


def test_rendered_scenes_are_confirmed():
    generator = np.random.default_rng(0)
    prompts = [
        prompts[index] for prompts in all_prompts().values() for index in generator.integers(len(prompts), size=60)
    ]
    images = np.stack([render(sample_scene(prompt, generator), generator) for prompt in prompts])
    reward = confirmation_of("geneval_correct")
    assert reward is not None
    agreed = checked_rewards(reward, images, prompts) == checked_rewards(
        build_reward("geneval_correct"), images, prompts
    )
    assert agreed.float().mean() >= 0.97


def test_prompt_that_the_detector_does_not_know_is_refused():
    reward = confirmation_of("geneval_correct")
    assert reward is not None
    with pytest.raises(ValueError, match='reward geneval_confirmed knows no class "dog"'):
        reward.check_prompt(counting("dog", 3))


def test_no_policy_can_train_on_the_second_opinion():
    names = {make().name for make in CONFIRMED_VERDICTS.values()}
    assert names == {"geneval_confirmed"} and not names & REWARDS.keys()
    for name in names:
        with pytest.raises(ValueError, match="is unknown"):
            build_reward(name)


def test_verdict_of_a_detector_without_a_counter_is_not_confirmed():
    assert CONFIRMED_VERDICTS.keys() <= REWARDS.keys()
    assert confirmation_of("scripted") is None
