"""What is not finite is found, kept from the advantages, counted, written down, and stops a run that has too much."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sfgrpo.errors import NumericsError
from sfgrpo.grpo.advantages import group_advantages
from sfgrpo.grpo.nonfinite import NumericalGuard, broken_images, without_broken_groups
from sfgrpo.types import Trajectory
from tests.support.tiny import tiny_prompts

GROUP_SIZE = 3
PROMPTS = tiny_prompts(4)


def advantages_of(rewards_NS: torch.Tensor, credit: str = "joint", std: str = "group"):
    return group_advantages(
        rewards_NS, group_size=GROUP_SIZE, states=(0, 1, 2), credit=credit, std=std, clip=5.0, gae_lambda=0.0
    )


@pytest.mark.parametrize("credit", ["joint", "per_step", "step_mean", "terminal"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_group_with_a_reward_that_is_no_number_is_constant_and_the_others_are_as_they_were(value, credit):
    rewards_NS = torch.randn(9, 3)
    expected = advantages_of(rewards_NS, credit)
    planted = rewards_NS.clone()
    planted[4, 1] = value
    cleaned, broken_N = without_broken_groups(planted, GROUP_SIZE)
    found = advantages_of(cleaned, credit)
    assert broken_N.nonzero().flatten().tolist() == [4]
    assert found.constant_N.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert not found.values_NK[3:6].any()
    others = [0, 1, 2, 6, 7, 8]
    assert torch.equal(found.values_NK[others], expected.values_NK[others])


def test_constant_group_leaves_the_mean_reward_where_the_others_have_it():
    rewards_NS = 26 + torch.randn(9, 3)
    rewards_NS[0, 0] = math.nan
    cleaned, _ = without_broken_groups(rewards_NS, GROUP_SIZE)
    torch.testing.assert_close(cleaned[:, -1].mean(), rewards_NS[3:, -1].mean())
    assert advantages_of(cleaned, "terminal", "global").values_NK[:3].abs().max() == 0


def test_rewards_that_are_all_finite_stay_as_they_are():
    rewards_NS = torch.randn(6, 3)
    cleaned, broken_N = without_broken_groups(rewards_NS, GROUP_SIZE)
    assert torch.equal(cleaned, rewards_NS) and not broken_N.any()


def test_rewards_that_are_all_broken_become_constant():
    cleaned, broken_N = without_broken_groups(torch.full((6, 3), math.nan), GROUP_SIZE)
    assert not cleaned.any() and broken_N.all()


@pytest.mark.parametrize("place", ["latents_NSCHW", "velocities_NKCHW"])
def test_image_with_a_latent_or_velocity_that_is_no_number_is_found(place):
    parts = {"latents_NSCHW": torch.zeros(3, 4, 2, 2, 2), "velocities_NKCHW": torch.zeros(3, 3, 2, 2, 2)}
    parts[place][1, 2, 0, 1, 1] = math.inf
    # A deterministic step has no log-prob; nothing is wrong with that.
    trajectory = Trajectory(**parts, log_probs_NK=torch.full((3, 3), math.nan))
    assert broken_images(trajectory).tolist() == [False, True, False]


def test_every_image_has_a_line_and_an_update_counts_once(tmp_path: Path):
    guard = NumericalGuard(1, tmp_path / "run/nonfinite.jsonl")
    guard.record(3, "reward", PROMPTS[:2])
    guard.record(3, "loss", [])
    guard.record(3, "gradient", PROMPTS[:1])
    assert guard.count == 1
    lines = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert lines == [
        {"update": 3, "kind": "reward", "prompt": PROMPTS[0].text},
        {"update": 3, "kind": "reward", "prompt": PROMPTS[1].text},
        {"update": 3, "kind": "gradient", "prompt": PROMPTS[0].text},
    ]


def test_nothing_broken_writes_nothing(tmp_path: Path):
    guard = NumericalGuard(0, tmp_path / "nonfinite.jsonl")
    guard.record(0, "reward", [])
    assert guard.count == 0 and not list(tmp_path.iterdir())


def test_run_stops_above_the_limit_with_the_prompts_on_file(tmp_path: Path):
    path = tmp_path / "nonfinite.jsonl"
    guard = NumericalGuard(2, path)
    for update in (0, 7):
        guard.record(update, "loss", PROMPTS[:1])
    named = ", ".join(repr(prompt.text) for prompt in PROMPTS[:3])
    with pytest.raises(NumericsError, match=r"3 updates had .* more than update.max_broken_updates = 2") as caught:
        guard.record(8, "reward", [*PROMPTS, PROMPTS[0]])
    assert f"the last of them a reward of {named}; " in str(caught.value) and str(path) in str(caught.value)
    assert len(path.read_text().splitlines()) == 7


def test_count_goes_on_where_a_resumed_run_left_it(tmp_path: Path):
    guard = NumericalGuard(2, tmp_path / "nonfinite.jsonl", count=2)
    with pytest.raises(NumericsError, match="3 updates"):
        guard.record(5, "loss", PROMPTS[:1])


def test_process_that_does_not_write_counts_all_the_same(tmp_path: Path):
    guard = NumericalGuard(0, tmp_path / "nonfinite.jsonl", writes=False)
    with pytest.raises(NumericsError, match="1 updates"):
        guard.record(0, "loss", PROMPTS[:1])
    assert not list(tmp_path.iterdir())
