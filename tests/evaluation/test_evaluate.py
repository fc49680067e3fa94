"""Evaluation: the sampler that people use, on noise that is the same for everyone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sfgrpo.evaluation.evaluate import (
    Evaluation,
    SamplingProtocol,
    draw_images,
    evaluate_policy,
    mean_rewards,
    thumbnails,
)
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.policies.base import Policy
from sfgrpo.promotion.diversity import diversity
from sfgrpo.rewards import CONFIRMED_VERDICTS
from sfgrpo.rewards.base import Reward
from sfgrpo.types import Prompt
from tests.support.tiny import Light, disturb, make_tiny_pipeline, make_tiny_policy, tiny_prompts

PROMPTS = tiny_prompts(3)
PER_PROMPT = 2
PROTOCOL = SamplingProtocol(images_per_prompt=PER_PROMPT, num_steps=2, guidance_scale=1.0, seed=7, micro_batch_size=4)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_tiny_policy()


class Scripted(Reward):
    """A reward that returns given scores and records its calls."""

    name = "scripted"

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float32)
        self.asked: list[Prompt] = []

    def __call__(self, images, prompts):
        first = len(self.asked)
        self.asked += prompts
        return self.values[first : len(self.asked)]


def evaluated(policy: Policy, is_correct: Reward, rewards: tuple[Reward, ...] = (), **options) -> Evaluation:
    return evaluate_policy(policy, PROMPTS, rewards, PROTOCOL, is_correct=is_correct, **{"shown": range(3)} | options)


def drawn(policy: Policy, texts: list[str], **changes) -> np.ndarray:
    options = {"num_steps": 3, "micro_batch_size": 8} | changes
    return draw_images(policy, policy.encode(texts), dataclasses.replace(PROTOCOL, **options))


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    """Compares in steps of 1/255; other batch sizes round differently by one."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def test_table_and_rewards_are_those_of_the_verdicts():
    verdict = Scripted([1, 0, 1, 1, 0, 0])
    evaluation = evaluated(make_tiny_policy(), verdict, (Light(),))
    assert evaluation.images.shape == (6, 32, 32, 3) and evaluation.images.dtype == np.uint8
    assert evaluation.correct.tolist() == [[True, False], [True, True], [False, False]]
    assert verdict.asked == [prompt for prompt in PROMPTS for _ in range(PER_PROMPT)]
    metrics = evaluation.to_dict()
    assert metrics["geneval/overall"] == metrics["geneval/counting"] == pytest.approx(0.5)
    assert metrics["geneval/num_images"] == 6 and metrics["geneval/num_prompts"] == 3
    assert metrics["evaluation/light"] == pytest.approx(evaluation.images.mean() / 255, abs=1e-5)


def test_agreement_is_that_of_the_counter_of_the_verdicts_detector(policy, monkeypatch):
    assert evaluated(policy, Scripted([1] * 6)).agreement is None
    disputed = Scripted([1, 0, 1, 1, 0, 0])
    monkeypatch.setitem(CONFIRMED_VERDICTS, "scripted", lambda: disputed)
    evaluation = evaluated(policy, Scripted([1, 0, 1, 1, 0, 1]), (Light(),))
    assert evaluation.agreement is not None and disputed.asked == [p for p in PROMPTS for _ in range(PER_PROMPT)]
    assert evaluation.agreement.confirmed_PG.tolist() == [[True, False], [True, True], [False, False]]
    assert evaluation.correct.tolist() == [[True, False], [True, True], [False, True]]
    assert list(evaluation.rewards) == ["light"]
    metrics = evaluation.to_dict()
    assert (metrics["agreement/share"], metrics["geneval/confirmed_counting"]) == (0.75, 0.5)


def test_scores_and_thumbnails_are_those_of_every_image():
    evaluation = evaluated(make_tiny_policy(), Scripted([1] * 6), (Light(),))
    images_PGHWC = evaluation.images.reshape(3, PER_PROMPT, 32, 32, 3)
    assert evaluation.rewards_PG["light"] == pytest.approx(images_PGHWC.mean(axis=(2, 3, 4)) / 255, abs=1e-6)
    assert evaluation.rewards == {"light": pytest.approx(evaluation.rewards_PG["light"].mean(), abs=1e-6)}
    assert np.array_equal(evaluation.thumbnails_PGHWC, images_PGHWC)
    assert np.array_equal(diversity(evaluation.thumbnails_PGHWC), diversity(images_PGHWC))
    assert evaluated(make_tiny_policy(), Scripted([1] * 6), shown=()).thumbnails_PGHWC.shape == images_PGHWC.shape


def test_thumbnail_is_the_average_of_areas():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), dtype=np.uint8)
    averages = images.reshape(2, 16, 4, 32, 4, 3).astype(np.float64).mean(axis=(2, 4))
    assert np.array_equal(thumbnails(images), averages.round().astype(np.uint8))
    assert thumbnails(images[:0]).shape == (0, 16, 32, 3)
    assert np.array_equal(thumbnails(images[:, :32, :20]), images[:, :32, :20])


def test_sampler_of_the_protocol_draws_the_images_whose_rewards_are_averaged(policy):
    noisy = dataclasses.replace(PROTOCOL, sampler="flow_sde", noise_level=0.7)
    plain = evaluated(policy, Scripted([1] * 6), (Light(),)).rewards
    assert mean_rewards(policy, PROMPTS, (Light(),), PROTOCOL) == plain
    assert mean_rewards(policy, PROMPTS, (Light(),), noisy) != plain


def test_only_the_images_of_the_prompts_that_are_shown_are_kept_in_their_order(policy):
    whole = evaluated(policy, Scripted([1] * 6)).images
    some = evaluated(policy, Scripted([1] * 6), shown=[2, 0]).images
    assert np.array_equal(some, np.concatenate([whole[4:], whole[:2]]))


def test_objects_are_counted_in_the_images_that_are_shown(policy):
    class Counting(Scripted):
        def seen(self, images, prompts):
            return [int(image[0, 0, 0]) + prompts.index(prompt) for image, prompt in zip(images, prompts, strict=True)]

    evaluation = evaluated(policy, Counting([1] * 6), shown=[2, 0])
    asked = [PROMPTS[row] for row in (2, 2, 0, 0)]
    assert evaluation.seen == Counting([]).seen(evaluation.images, asked)
    assert evaluation.samples.seen is evaluation.seen and evaluation.samples.images is evaluation.images


def test_somebody_may_look_in_after_every_pass_and_every_batch(policy):
    visits = []
    evaluated(policy, Scripted([1] * 6), on_pass=lambda: visits.append(1))
    assert len(visits) == 2 * (PROTOCOL.num_steps + 1)


def test_images_are_those_of_the_plain_pipeline(policy):
    texts = [prompt.text for prompt in PROMPTS]
    plain = make_tiny_pipeline()
    plain.register_modules(text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    for scale in (1.0, 3.0):
        images = plain(
            texts,
            num_inference_steps=3,
            guidance_scale=scale,
            max_sequence_length=0,
            latents=gaussian_noise(7, "evaluation", 0, range(3), policy.latent_shape),
            output_type="np",
        ).images
        assert largest_difference(drawn(policy, texts, guidance_scale=scale), (images * 255).round()) <= 1


def test_two_policies_are_judged_on_the_same_noise(policy):
    other = make_tiny_policy(seed=5)
    starts: list[torch.Tensor] = []
    for one in (policy, other):
        hook = one.module.register_forward_pre_hook(
            lambda module, positional, named: starts.append(named["hidden_states"]), with_kwargs=True
        )
        drawn(one, ["a photo of a ring"] * 3, num_steps=2)
        hook.remove()
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[1], starts[0])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_adapter_changes_the_images(policy):
    before = drawn(policy, ["a photo of a ring"])
    other = make_tiny_policy()
    assert np.array_equal(drawn(other, ["a photo of a ring"]), before)
    disturb(other)
    assert not np.array_equal(drawn(other, ["a photo of a ring"]), before)


def test_batch_size_changes_no_image(policy):
    texts = [prompt.text for prompt in PROMPTS] * 2
    together = drawn(policy, texts)
    for size in (1, 4):
        assert largest_difference(drawn(policy, texts, micro_batch_size=size), together) <= 1


def test_seed_changes_every_image(policy):
    texts = [prompt.text for prompt in PROMPTS]
    first, second = drawn(policy, texts), drawn(policy, texts, seed=8)
    assert not any(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
