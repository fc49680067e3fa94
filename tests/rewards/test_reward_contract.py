"""What every reward of the table promises; a new reward is tested here without a line of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfgrpo.rewards import PRETRAINED_REWARDS, REWARDS, Reward, build_reward, checked_rewards
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import render, sample_scene


@pytest.fixture(scope="module")
def batch():
    """Scenes that fit their prompt, scenes that do not, noise, and blank grounds; one of each for every task."""
    generator = np.random.default_rng(0)
    images, prompts = [], []
    for space in all_prompts().values():
        prompt, other = (space[index] for index in generator.choice(len(space), size=2, replace=False))
        images += [render(sample_scene(shown, generator), generator) for shown in (prompt, other)]
        images.append(generator.integers(256, size=(32, 32, 3), dtype=np.uint8))
        images += [np.full((32, 32, 3), level, dtype=np.uint8) for level in (0, 18, 128, 255)]
        prompts += [prompt] * 7
    return np.stack(images), prompts


MODELS = {"clip": "models/shapes-clip"}
"""The shipped model for each reward that needs one."""


@pytest.fixture(scope="module", params=[*REWARDS, *PRETRAINED_REWARDS])
def named_reward(request, pytestconfig) -> tuple[str, Reward]:
    model = MODELS[request.param] if request.param in PRETRAINED_REWARDS else None
    return request.param, build_reward(request.param, pretrained=model and str(pytestconfig.rootpath / model))


@pytest.fixture
def reward(named_reward) -> Reward:
    return named_reward[1]


def test_reward_bears_the_name_of_its_entry(named_reward):
    name, reward = named_reward
    assert reward.name == name


def test_no_name_is_in_both_tables():
    assert not REWARDS.keys() & PRETRAINED_REWARDS.keys()


def test_reward_takes_every_prompt_of_the_shapes_world(reward):
    for space in all_prompts().values():
        for prompt in space:
            reward.check_prompt(prompt)


def test_reward_gives_one_finite_float32_on_the_cpu_for_every_image(reward, batch):
    rewards = checked_rewards(reward, *batch)
    assert rewards.shape == (len(batch[1]),)
    assert rewards.dtype == torch.float32
    assert rewards.device.type == "cpu"
    assert not rewards.requires_grad


def test_reward_lies_in_the_unit_interval_and_a_models_is_a_cosine(reward, batch):
    rewards = reward(*batch)
    assert rewards.min() >= (-1.0 if reward.name in PRETRAINED_REWARDS else 0.0)
    assert rewards.max() <= 1.0


def test_reward_is_deterministic(reward, batch):
    torch.testing.assert_close(reward(*batch), reward(*batch), rtol=0, atol=0)


def test_reward_of_an_image_ignores_the_rest_of_the_batch(reward, batch):
    images, prompts = batch
    alone = [reward(images[index : index + 1], prompts[index : index + 1]) for index in range(len(images))]
    # The size of a batch decides in which order a matrix product adds up.
    tolerance = 1e-6 if reward.name in PRETRAINED_REWARDS else 0.0
    torch.testing.assert_close(torch.cat(alone), reward(images, prompts), rtol=0, atol=tolerance)


def test_reward_commutes_with_a_permutation(reward, batch):
    images, prompts = batch
    order = np.random.default_rng(1).permutation(len(images))
    permuted = reward(images[order], [prompts[index] for index in order])
    tolerance = 1e-6 if reward.name in PRETRAINED_REWARDS else 0.0
    torch.testing.assert_close(permuted, reward(images, prompts)[order], rtol=0, atol=tolerance)


def test_reward_leaves_its_images_alone(reward, batch):
    images, prompts = batch
    copy = images.copy()
    reward(copy, prompts)
    np.testing.assert_array_equal(copy, images)


def test_reward_takes_an_empty_batch(reward):
    assert reward(np.empty((0, 32, 32, 3), dtype=np.uint8), []).shape == (0,)


def test_reward_prefers_what_the_prompt_asks_for(reward, batch):
    fitting, other, noise = (reward(*batch).view(-1, 7)[:, column] for column in range(3))
    assert fitting.mean() > 0.95 or reward.name in PRETRAINED_REWARDS
    assert fitting.mean() > other.mean() + 0.3
    assert fitting.mean() > noise.mean() + 0.3
