"""The rewards one by one: the soft credit by hand and against Flow-GRPO's, the held-out likeness, and the checks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from sfgrpo.errors import RewardError
from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.geneval.scorer import is_correct
from sfgrpo.rewards import Reward, build_reward, checked_rewards
from sfgrpo.rewards.base import Vocabulary, raw_rewards
from sfgrpo.rewards.geneval import GenEvalReward, soft_credit
from sfgrpo.rewards.likeness import LikenessReward, likeness
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import Shape, render, sample_scene
from sfgrpo.types import TAGS, Box, Clause, Detection
from tests.support.reproductions import partial_credit

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


def seen(name: str, score: float = 1.0, box: Box = LEFT, color: str | None = None, quality: float = 1.0) -> Detection:
    return Detection(class_name=name, box=box, score=score, color=color, quality=quality)


class Constant(Reward):
    """Return the same tensor, or raises the same error, whatever it sees."""

    def __init__(self, outcome: torch.Tensor | Exception, name: str = "constant") -> None:
        self._outcome, self.name = outcome, name

    def __call__(self, images, prompts):
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


CAT_AND_DOG = [single_object("cat"), single_object("dog")]
PETS = Vocabulary(classes=("cat", "dog"), colors=("brown",))
BLANK = np.zeros((2, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("prompt", "detections", "credit"),
    [
        (single_object("dog"), [seen("dog", 0.2)], 0.2),
        (single_object("dog"), [seen("dog")] * 3, 0.0),
        (two_object("dog", "cat"), [seen("dog", 0.6), seen("bird")], 0.3),
        (counting("dog", 4), [seen("dog", 0.5)] * 4, 0.5),
        (counting("dog", 2), [seen("dog")] * 3, 0.5),
        (counting("dog", 2), [seen("dog", quality=0.5)] * 2, 0.5),
        (counting("dog", 2), [seen("dog"), seen("dog"), seen("dog", quality=0.1)], 0.5),
        (counting("dog", 2), [seen("dog"), seen("dog", 0.5, quality=0.1), seen("dog", quality=0.5)], (1.5 - 0.5) / 2),
        (single_object("dog"), [seen("dog", 0.5)] * 2, 0.0),
        (colors("dog", "red"), [seen("dog", quality=0.4, color="red")], 0.4),
        (colors("dog", "red"), [seen("dog", 0.8, color="red")], 0.8),
        (colors("dog", "red"), [seen("dog", 0.8, color="blue")], 0.4),
        (colors("dog", "red"), [seen("dog", color="red"), seen("dog", 0.5, color="blue")], (0.5 + 0.5 / 1.5) / 2),
        (color_attr("dog", "cat", "red", "blue"), [seen("dog", color="red"), seen("cat", color="red")], 0.75),
        (position("dog", "cat", "left of"), [seen("dog", 0.5), seen("cat", 0.8, RIGHT)], (0.8 + 0.5 + 0.4) / 3),
        (position("dog", "cat", "right of"), [seen("dog"), seen("cat", 1.0, RIGHT)], 2 / 3),
        (position("dog", "cat", "left of"), [seen("dog")], 1 / 3),
        (position("dog", "cat", "left of"), [], 0.0),
    ],
)
def test_soft_credit_by_hand(prompt, detections, credit):
    assert soft_credit(prompt, detections) == pytest.approx(credit)


@pytest.mark.parametrize("tag", TAGS)
def test_soft_credit_is_flow_grpos_when_scores_saturate(tag):
    """At most twice the count of a class, so that no part needs the clamp, and no wrong relation."""
    generator = np.random.default_rng(0)
    space = all_prompts()[tag]
    for prompt in (space[index] for index in generator.integers(len(space), size=50)):
        boxes = {"left of": (LEFT, RIGHT), "above": ((0, 0, 10, 10), (0, 50, 10, 60))}
        boxes |= {"right of": boxes["left of"][::-1], "below": boxes["above"][::-1]}
        relation = prompt.include[-1].position
        own, target = boxes[relation[0]] if relation else (LEFT, RIGHT)
        detections = []
        for clause in prompt.include:
            for _ in range(generator.integers(2 * clause.count + 1)):
                hue = generator.choice(["red", clause.color or "blue"])
                detections.append(seen(clause.class_name, 1.0, own if clause.position else target, hue))
        assert soft_credit(prompt, detections) == pytest.approx(partial_credit(prompt, detections))


@pytest.mark.parametrize("prompt", [single_object("dog"), counting("dog", 3), colors("dog", "red")])
def test_soft_credit_rises_with_the_score_from_below_the_threshold(prompt):
    count = prompt.include[0].count
    credits = [soft_credit(prompt, [seen("dog", score, color="red")] * count) for score in np.linspace(0, 1, 21)]
    assert np.all(np.diff(credits) > 0)
    assert (credits[0], credits[-1]) == (0.0, 1.0)


def test_verdict_does_not_look_at_quality():
    assert is_correct(counting("dog", 2), [seen("dog", quality=0.0)] * 2)
    assert not is_correct(counting("dog", 2), [seen("dog", quality=0.0)] * 3)


def test_object_too_many_costs_the_same_however_badly_it_is_drawn():
    dogs = [seen("dog"), seen("dog")]
    credits = [soft_credit(counting("dog", 2), [*dogs, seen("dog", quality=quality)]) for quality in (1.0, 0.5, 0.0)]
    assert credits == [0.5, 0.5, 0.5]


def test_geneval_rewards_ask_their_detector_once_for_the_whole_batch():
    calls = []

    def detector(images):
        calls.append(len(images))
        return [[seen("dog", 0.2)], [seen("dog", 0.9)]]

    rewards = GenEvalReward("geneval", soft_credit, detector, PETS)(BLANK, [single_object("dog")] * 2)
    torch.testing.assert_close(rewards, torch.tensor([0.2, 0.9]))
    verdicts = GenEvalReward("geneval_correct", is_correct, detector, PETS)(BLANK, [single_object("dog")] * 2)
    torch.testing.assert_close(verdicts, torch.tensor([0.0, 1.0]))
    assert calls == [2, 2]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (single_object("skis"), 'reward geneval knows no class "skis"; it knows cat, dog'),
        (two_object("cat", "Dog"), 'knows no class "Dog"'),
        (colors("dog", "pink"), 'knows no colour "pink"; it knows brown, so reword the prompt'),
        (dataclasses.replace(single_object("dog"), exclude=(Clause(class_name="cow", count=1),)), 'no class "cow"'),
    ],
)
def test_a_detector_refuses_what_it_cannot_tell_apart(prompt, complaint):
    reward = GenEvalReward("geneval", soft_credit, lambda images: [], PETS)
    reward.check_prompt(colors("dog", "brown"))
    with pytest.raises(ValueError, match=complaint):
        reward.check_prompt(prompt)


def test_a_detector_that_loses_an_image_is_an_error():
    with pytest.raises(RewardError, match=r"reward geneval failed on .*shorter"):
        reward = GenEvalReward("geneval", soft_credit, lambda images: [[]] * (len(images) - 1), PETS)
        checked_rewards(reward, BLANK, CAT_AND_DOG)


def paired_likeness(tag: str, num_images: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Likeness of rendered images to their own prompt, and to another one of the task."""
    generator = np.random.default_rng(2)
    space = all_prompts()[tag]
    pairs = [generator.choice(len(space), size=2, replace=False) for _ in range(num_images)]
    images = np.stack([render(sample_scene(space[right], generator), generator) for right, _ in pairs])
    reward = LikenessReward()
    return reward(images, [space[right] for right, _ in pairs]), reward(images, [space[wrong] for _, wrong in pairs])


@pytest.mark.parametrize("tag", TAGS)
def test_likeness_ranks_right_prompts_above_wrong_ones(tag):
    right, wrong = paired_likeness(tag)
    wins = (right[:, None] > wrong).float() + 0.5 * (right[:, None] == wrong).float()
    assert wins.mean() > 0.9
    assert right.mean() > 0.95


CIRCLE = Shape(class_name="circle", color="red", center=(10.0, 10.0), radius=6.0)
SQUARE = Shape(class_name="square", color="blue", center=(23.0, 23.0), radius=6.0)


def drawn(*shapes: Shape):
    return render(shapes, np.random.default_rng(0))


def test_likeness_falls_with_every_unexplained_object():
    prompt = single_object("circle")
    assert likeness(drawn(CIRCLE), prompt) > likeness(drawn(CIRCLE, SQUARE), prompt) + 0.3


def test_likeness_falls_with_every_missing_object():
    prompt = two_object("circle", "square")
    assert likeness(drawn(CIRCLE, SQUARE), prompt) > likeness(drawn(CIRCLE), prompt) + 0.3


def test_likeness_wants_the_asked_color():
    assert likeness(drawn(CIRCLE), colors("circle", "red")) > 0.9
    assert likeness(drawn(CIRCLE), colors("circle", "orange")) < 0.3


def test_likeness_cares_for_places_only_so_far_as_objects_stay_apart():
    prompt = position("circle", "square", "below")
    assert likeness(drawn(CIRCLE, SQUARE), prompt) > 0.9


def test_likeness_fades_with_contrast():
    clean = drawn(CIRCLE).astype(np.float32)
    faded = [np.round(clean[0, 0] + share * (clean - clean[0, 0])).astype(np.uint8) for share in (1.0, 0.4, 0.2, 0.0)]
    values = [likeness(image, single_object("circle")) for image in faded]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_named_with_image_and_prompt(value):
    with pytest.raises(RewardError, match=r"gave -?(nan|inf) for image 1 \('a photo of a dog'\)"):
        checked_rewards(Constant(torch.tensor([0.0, value])), BLANK, CAT_AND_DOG)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_raw_rewards_let_numbers_that_are_not_finite_pass(value):
    rewards = torch.tensor([0.0, value])
    assert raw_rewards(Constant(rewards), BLANK, CAT_AND_DOG) is rewards


@pytest.mark.parametrize("rewards", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
def test_a_wrong_shape_or_type_is_named_with_the_prompt(rewards):
    with pytest.raises(RewardError, match=r"for 2 images .*'a photo of a cat'.*must give \[2\] torch.float32"):
        checked_rewards(Constant(rewards), BLANK, CAT_AND_DOG)


def test_an_exception_is_chained_and_names_the_image_that_fails_alone():
    class Picky(Constant):
        def __call__(self, images, prompts):
            if any("dog" in prompt.text for prompt in prompts):
                raise ZeroDivisionError("no dogs")
            return torch.zeros(len(prompts))

    with pytest.raises(RewardError, match=r"failed on image 1 \('a photo of a dog'\): no dogs") as caught:
        checked_rewards(Picky(torch.zeros(0)), BLANK, CAT_AND_DOG)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_image_repeats_alone_is_the_batchs():
    class Small(Constant):
        def __call__(self, images, prompts):
            if len(images) > 1:
                raise MemoryError("too many images")
            return torch.zeros(len(images))

    with pytest.raises(RewardError, match="failed on the batch as a whole: too many images"):
        checked_rewards(Small(torch.zeros(0)), BLANK, CAT_AND_DOG)


def test_images_and_prompts_must_pair_up():
    with pytest.raises(ValueError, match="2 images with 1 prompts"):
        checked_rewards(Constant(torch.zeros(2)), BLANK, CAT_AND_DOG[:1])


def test_an_unknown_reward_is_refused_with_the_allowed_ones():
    allowed = "geneval, geneval_correct, likeness, clip"
    with pytest.raises(ValueError, match=f"reward 'beauty' is unknown; allowed are {allowed}"):
        build_reward("beauty")


def test_a_reward_with_a_model_needs_its_name():
    with pytest.raises(ValueError, match=r"reward 'clip' needs a model; set reward.pretrained, .* models/shapes-clip"):
        build_reward("clip")


@pytest.mark.parametrize("option", ["pretrained", "revision"])
def test_a_reward_without_a_model_takes_none(option):
    with pytest.raises(ValueError, match=r"reward 'geneval' takes no model; set reward\.pretrained .* to null"):
        build_reward("geneval", **{option: "models/shapes-clip"})


def test_former_name_of_a_reward_is_refused_with_the_new_one():
    with pytest.raises(ValueError, match="reward 'geneval_strict' is now called 'geneval_correct'; write that instead"):
        build_reward("geneval_strict")


def test_detector_counts_the_objects_of_counting_prompts_alone():
    found = [[seen("dog", 0.95), seen("dog", 0.91), seen("dog", 0.85), seen("cat", 0.99)], [], []]
    called = []

    def detector(images):
        called.append(len(images))
        return found[: len(images)]

    verdict = GenEvalReward("geneval_correct", is_correct, detector, PETS)
    prompts = [single_object("dog"), counting("dog", 2), counting("cat", 3)]
    assert verdict.seen(np.zeros((3, 32, 32, 3), np.uint8), prompts) == [None, 2, 0]
    assert called == [2]
    assert verdict.seen(np.zeros((1, 32, 32, 3), np.uint8), prompts[:1]) == [None]
    assert called == [2], "nothing to count, nothing to detect"


def test_reward_without_a_detector_counts_nothing():
    assert LikenessReward().seen(BLANK, [counting("circle", 2)] * len(BLANK)) == [None] * len(BLANK)
