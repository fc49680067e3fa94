"""A policy that learned to flatter its detector: every gate but one lets it pass, and that one refuses it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sfgrpo.config.schema import PolicyConfig
from sfgrpo.config.stages import EvaluateStage, PromoteStage, PromptsStage, load_config
from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.evaluation.evaluate import draw_images, protocol_of
from sfgrpo.factory import base_of, make_policy
from sfgrpo.geneval.scorer import asks_for_a_number, count_all, is_correct
from sfgrpo.policies.adapter import read_adapter, require_base
from sfgrpo.promotion.diversity import diversity
from sfgrpo.promotion.gates import Comparison, ModelScores, compare_scores
from sfgrpo.rewards import SHAPES, build_reward, checked_rewards
from sfgrpo.rewards.confirmed import ConfirmedVerdict
from sfgrpo.rewards.geneval import Detector, GenEvalReward, soft_credit
from sfgrpo.runtime.environment import Environment
from sfgrpo.shapes.counter import count_objects
from sfgrpo.shapes.detector import detect_images
from sfgrpo.shapes.prompt_sets import split_prompts
from sfgrpo.types import Prompt
from tests.support.flattering_detector import detect_flattered
from tests.support.paths import ROOT

PER_TASK = 16
"""Evaluation prompts of the demo at most; all that ask for a number are among them."""
ADAPTER = ROOT / "tests/data/flattering_adapter"
pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a model drew for a promotion: the images of all prompts, and more of those that ask for a number."""

    images_PGHWC: np.ndarray
    more_PGHWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawings:
    """The drawings of both models with the parameters of the demo."""

    config: PromoteStage
    prompts: list[Prompt]
    base: Drawn
    trained: Drawn

    @property
    def counted(self) -> list[Prompt]:
        return list(filter(asks_for_a_number, self.prompts))

    def compare(self, detector: Detector) -> Comparison:
        """Compare the trained policy with its base model, both judged by one detector."""
        scores = (self.judge(drawn, detector) for drawn in (self.trained, self.base))
        return compare_scores(self.prompts, *scores, self.config.promotion)

    def judge(self, drawn: Drawn, detector: Detector) -> ModelScores:
        verdict = GenEvalReward("verdict", is_correct, detector, SHAPES)
        confirmation = ConfirmedVerdict("confirmed", detector, count_objects, SHAPES)
        images, more = drawn.images_PGHWC, drawn.more_PGHWC
        return ModelScores(
            correct_PG=score(verdict, images, self.prompts) == 1.0,
            held_out_PG=score(build_reward("likeness"), images, self.prompts),
            training_PG=score(GenEvalReward("soft", soft_credit, detector, SHAPES), images, self.prompts),
            diversity_P=diversity(images),
            agreement=Agreement.of(
                self.counted, score(verdict, more, self.counted) == 1.0, score(confirmation, more, self.counted) == 1.0
            ),
        )


def score(reward, images_PGHWC: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    num_images = images_PGHWC.shape[1]
    repeated = [prompt for prompt in prompts for _ in range(num_images)]
    return checked_rewards(reward, np.concatenate(images_PGHWC), repeated).numpy().reshape(-1, num_images)


def demo_prompts() -> list[Prompt]:
    stage = load_config(PromptsStage, ROOT / "params.yaml")
    _, evaluation = split_prompts(stage.prompts.num_evaluation, stage.seed)
    return [prompt for prompts in evaluation.values() for prompt in prompts[:PER_TASK]]


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    config = load_config(PromoteStage, ROOT / "params.yaml")
    stage = load_config(EvaluateStage, ROOT / "params.yaml")
    pipeline: PolicyConfig = dataclasses.replace(stage.policy, pretrained=str(ROOT / stage.policy.pretrained))
    adapter = read_adapter(ADAPTER)
    require_base(adapter, base_of(pipeline))
    policy = make_policy(pipeline, 0, Environment(SFGRPO_DEVICE="cpu"))
    prompts = demo_prompts()
    protocol = dataclasses.replace(protocol_of(config.evaluation), seed=config.promotion.seed)

    def draw(prompts: list[Prompt], num_images: int) -> np.ndarray:
        texts = [prompt.text for prompt in prompts for _ in range(num_images)]
        images = draw_images(policy, policy.encode(texts), protocol)
        return images.reshape(len(prompts), num_images, *images.shape[1:])

    def drawn() -> Drawn:
        counted = list(filter(asks_for_a_number, prompts))
        return Drawn(draw(prompts, protocol.images_per_prompt), draw(counted, config.promotion.agreement_images))

    with torch.no_grad():
        base = drawn()
        policy.load_adapter(ADAPTER)
        return Drawings(config=config, prompts=prompts, base=base, trained=drawn())


def disputed(drawings: Drawings) -> tuple[list[Prompt], np.ndarray, np.ndarray]:
    """Return the trained policy's images whose number the flattered detector calls correct and the counter disputes.

    With their prompts, and how many objects the counter sees in each.
    """
    num_images = drawings.trained.more_PGHWC.shape[1]
    prompts = [prompt for prompt in drawings.counted for _ in range(num_images)]
    images = np.concatenate(drawings.trained.more_PGHWC)
    numbers = count_objects(images)
    chosen = [
        index
        for index, (prompt, found) in enumerate(zip(prompts, detect_flattered(images), strict=True))
        if is_correct(prompt, found) and count_all(prompt, found) != numbers[index]
    ]
    return [prompts[index] for index in chosen], images[chosen], numbers[chosen]


def test_judged_by_the_detector_that_it_flatters_it_fails_the_gate_of_the_agreement_alone(drawings):
    comparison = drawings.compare(detect_flattered)
    gains = {gate.name: gate.observed for gate in comparison.gates}
    assert gains["tasks"]["counting"].estimate > 0.2
    assert comparison.candidate_score - comparison.baseline_score > 0.05
    assert comparison.failed == ("agreement",)


def test_what_it_hides_is_what_the_counter_sees(drawings):
    prompts, _, numbers = disputed(drawings)
    asked = [prompt.include[0].count for prompt in prompts]
    assert len(asked) > 10
    assert np.mean(numbers > asked) > 0.9


def test_detector_of_today_is_not_flattered(drawings):
    prompts, images, numbers = disputed(drawings)
    found = list(zip(prompts, detect_images(images), strict=True))
    assert np.mean([is_correct(*pair) for pair in found]) < 0.5
    assert np.mean([count_all(*pair) for pair in found] == numbers) > 0.7
    today, then = (
        {gate.name: gate for gate in drawings.compare(detector).gates}["agreement"]
        for detector in (detect_images, detect_flattered)
    )
    assert today.observed["agreement"].lower > then.observed["agreement"].upper
