"""Scores of all states against a loop over single states, and what they cost."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accelerate import Accelerator

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.schema import SamplingConfig
from sfgrpo.config.stages import TrainStage, load_config
from sfgrpo.grpo.distributed import Partition, row_slices
from sfgrpo.grpo.estimates import substep_sigmas
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.scoring import StateScorer, collect_rewards, share_start_rewards
from sfgrpo.policies.base import Policy
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Conditioning, Prompt, Trajectory
from tests.support.tiny import Light, counted_passes, disturb, make_tiny_policy, tiny_prompts

NUM_PROMPTS, GROUP_SIZE, NUM_STEPS = 2, 3, 4
NUM_IMAGES = NUM_PROMPTS * GROUP_SIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A policy and what it rolled out, with start noise shared by groups."""

    policy: Policy
    trajectory: Trajectory
    conditioning: Conditioning
    prompts: list[Prompt]
    sigmas: torch.Tensor


@pytest.fixture(scope="module")
def line() -> Line:
    policy = make_tiny_policy()
    disturb(policy)
    prompts = [prompt for prompt in tiny_prompts(NUM_PROMPTS) for _ in range(GROUP_SIZE)]
    conditioning = policy.encode([prompt.text for prompt in prompts])
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(NUM_PROMPTS, *policy.latent_shape, generator=generator).repeat_interleave(GROUP_SIZE, dim=0)
    noise = torch.randn(NUM_IMAGES, NUM_STEPS, *policy.latent_shape, generator=generator)
    sigmas = policy.sigmas(NUM_STEPS)
    sampling = SamplingConfig(sampler="flow_sde", num_steps=NUM_STEPS, noise_level=0.7)
    trajectory = roll_out(policy, conditioning, start, noise, sigmas, sampling)
    return Line(policy=policy, trajectory=trajectory, conditioning=conditioning, prompts=prompts, sigmas=sigmas)


def naive_estimate(line: Line, row: int, state: int, num_substeps: int, guidance_scale: float = 1.0) -> torch.Tensor:
    """Runs Euler from one state of one image to 0, evaluating the policy at every substep, the first one too."""
    x = line.trajectory.latents_NSCHW[row, state][None]
    grid = substep_sigmas(line.sigmas, num_substeps)[state].tolist()
    for sigma, sigma_next in itertools.pairwise(grid):
        with torch.no_grad():
            velocity = line.policy.velocity(x, torch.tensor([sigma]), line.conditioning[[row]], guidance_scale)
        x = x + (sigma_next - sigma) * velocity
    return x[0]


def scorer_for(line: Line, **changes) -> StateScorer:
    options = {
        "policy": line.policy,
        "reward": Light(),
        "sigmas_S": line.sigmas,
        "states": range(NUM_STEPS + 1),
        "num_substeps": 2,
        "guidance_scale": 1.0,
        "micro_batch_size": 5,
    }
    return StateScorer(**options | changes)


def estimated(line: Line, rows: list[int], states: list[int], num_substeps: int, **changes) -> torch.Tensor:
    scorer = scorer_for(line, num_substeps=num_substeps, **changes)
    return scorer.estimate(line.trajectory, line.conditioning, torch.tensor(rows), torch.tensor(states))


def scored(line: Line, clock: PhaseClock | None = None, **changes) -> torch.Tensor:
    """Scores the line's images, with the start state's reward shared by the group."""
    scorer, first_rows = scorer_for(line, **changes), range(0, NUM_IMAGES, GROUP_SIZE)
    rewards = scorer.score(line.trajectory, line.conditioning, line.prompts, first_rows, clock or PhaseClock())
    return share_start_rewards(rewards, scorer.states, GROUP_SIZE)


def every_state() -> tuple[list[int], list[int]]:
    pairs = [(row, state) for row in range(NUM_IMAGES) for state in range(NUM_STEPS)]
    return [row for row, _ in pairs], [state for _, state in pairs]


@pytest.mark.parametrize("num_substeps", [1, 2, 3, 9])
def test_estimates_are_those_of_single_euler_runs(line, num_substeps):
    rows, states = every_state()
    expected = [naive_estimate(line, row, state, num_substeps) for row, state in zip(rows, states, strict=True)]
    torch.testing.assert_close(estimated(line, rows, states, num_substeps), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_one_substep_is_tweedies_formula_and_costs_nothing(line):
    rows, states = every_state()
    with counted_passes(line.policy) as sizes:
        estimates = estimated(line, rows, states, 1)
    assert not sizes
    x, velocity = line.trajectory.latents_NSCHW[rows, states], line.trajectory.velocities_NKCHW[rows, states]
    torch.testing.assert_close(estimates, x - line.sigmas[states].view(-1, 1, 1, 1) * velocity)


def test_estimates_leave_the_trajectory_alone(line):
    before = line.trajectory.latents_NSCHW.clone()
    estimated(line, *every_state(), 3)
    assert torch.equal(line.trajectory.latents_NSCHW, before)


def test_guidance_of_the_rollout_is_that_of_the_estimates(line):
    with counted_passes(line.policy) as sizes:
        estimate = estimated(line, [4], [3], 9, guidance_scale=3.0)
    assert not sizes
    first = (
        line.trajectory.latents_NSCHW[4, 2][None]
        - (line.sigmas[2] - line.sigmas[3]) * (line.trajectory.velocities_NKCHW[4, 2])
    )
    with torch.no_grad():
        velocity = line.policy.velocity(first, line.sigmas[[3]], line.conditioning[[4]], 3.0)
    expected = first - line.sigmas[3] * velocity
    torch.testing.assert_close(estimated(line, [4], [2], 9, guidance_scale=3.0), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(estimate, estimated(line, [4], [2], 9))


@pytest.mark.parametrize("num_substeps", [1, 2, 3, 5, 9])
def test_passes_are_those_that_the_batch_arithmetic_announces(line, num_substeps, pytestconfig):
    config = load_config(TrainStage, pytestconfig.rootpath / "params.yaml")
    config: TrainStage = dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, num_steps=NUM_STEPS),
        rollout=dataclasses.replace(
            config.rollout, prompts_per_update=NUM_PROMPTS, group_size=GROUP_SIZE, micro_batch_size=NUM_IMAGES
        ),
        advantage=dataclasses.replace(config.advantage, credit="joint", std="group"),
        update=dataclasses.replace(config.update, steps_per_update=1, trained_steps=None, micro_batch_size=NUM_IMAGES),
        estimates=dataclasses.replace(config.estimates, num_substeps=num_substeps),
    )
    with counted_passes(line.policy) as sizes:
        scored(line, num_substeps=num_substeps)
    assert sum(sizes) == pytest.approx(BatchArithmetic(config=config).estimate_passes * NUM_IMAGES)


def test_every_reward_is_that_of_its_state(line):
    rewards = scored(line, num_substeps=2)
    assert rewards.shape == (NUM_IMAGES, NUM_STEPS + 1)
    for row in range(NUM_IMAGES):
        shared = row - row % GROUP_SIZE
        estimates = [naive_estimate(line, row if state else shared, state, 2) for state in range(NUM_STEPS)]
        clean = torch.stack([*estimates, line.trajectory.latents_NSCHW[row, -1]])
        images = torch.from_numpy(line.policy.decode(clean)).double()
        torch.testing.assert_close(rewards[row].double(), images.mean(dim=(1, 2, 3)) / 255, rtol=0, atol=1e-3)


def test_final_state_is_the_image_itself(line):
    images = line.policy.decode(line.trajectory.latents_NSCHW[:, -1])
    torch.testing.assert_close(scored(line)[:, -1], Light()(images, line.prompts), rtol=0, atol=1e-3)


class Counting(Light):
    """Remembers the prompts of all images it was shown."""

    def __init__(self) -> None:
        self.seen: list[Prompt] = []

    def __call__(self, images, prompts):
        self.seen += prompts
        return super().__call__(images, prompts)


def test_start_state_is_rewarded_once_for_its_group(line):
    reward = Counting()
    rewards = scored(line, reward=reward)
    per_group = 1 + GROUP_SIZE * NUM_STEPS
    assert [reward.seen.count(prompt) for prompt in dict.fromkeys(line.prompts)] == [per_group] * NUM_PROMPTS
    first = rewards[:, 0].reshape(NUM_PROMPTS, GROUP_SIZE)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert first[0, 0] != first[1, 0]


@pytest.mark.parametrize("states", [(0, 2, NUM_STEPS), (0, NUM_STEPS), (1, NUM_STEPS), (NUM_STEPS,)])
def test_states_that_are_left_out_cost_nothing_and_change_no_reward(line, states):
    reward = Counting()
    rewards = scored(line, reward=reward, states=states)
    torch.testing.assert_close(rewards, scored(line)[:, list(states)], rtol=0, atol=2e-3)
    assert len(reward.seen) == sum(NUM_PROMPTS if state == 0 else NUM_IMAGES for state in states)


def test_rows_that_speak_for_no_group_have_no_start_reward(line):
    scorer = scorer_for(line, states=(0, NUM_STEPS))
    rewards = scorer.score(line.trajectory, line.conditioning, line.prompts, [], PhaseClock())
    assert rewards[:, 0].isnan().all() and rewards[:, 1].isfinite().all()


def test_image_whose_path_is_not_finite_has_no_reward_at_all(line):
    latents = line.trajectory.latents_NSCHW.clone()
    latents[3, 2, 0, 0, 0] = torch.inf
    broken = dataclasses.replace(line, trajectory=dataclasses.replace(line.trajectory, latents_NSCHW=latents))
    rewards, expected = scored(broken, states=(1, NUM_STEPS)), scored(line, states=(1, NUM_STEPS))
    assert rewards[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    torch.testing.assert_close(rewards[others], expected[others])


def test_collected_rewards_share_the_start_and_make_broken_groups_constant():
    own = torch.tensor([[0.5, 1.0], [torch.nan, 2.0], [0.25, torch.inf], [torch.nan, 4.0]])
    partition = Partition(num_images=4, num_steps=1, num_processes=1)
    rewards, broken_N = collect_rewards(
        own, states=(0, 1), group_size=2, partition=partition, accelerator=Accelerator(cpu=True)
    )
    assert rewards.tolist() == [[0.5, 1.0], [0.5, 2.0], [1.5, 1.5], [1.5, 1.5]]
    assert broken_N.tolist() == [False, False, True, False]


def test_empty_slices_change_no_estimate(line):
    rows, states = every_state()
    padded = estimated(line, rows, states, 3, cut=lambda n, size: [*row_slices(n, size), slice(n, n), slice(n, n)])
    assert torch.equal(padded, estimated(line, rows, states, 3))


def test_clock_tells_estimates_decoding_and_reward_apart(line):
    clock = PhaseClock()
    scored(line, clock=clock)
    assert clock.seconds.keys() == {"estimates", "decode", "reward"}
    assert min(clock.seconds.values()) > 0


def test_micro_batches_change_no_reward(line):
    torch.testing.assert_close(scored(line, micro_batch_size=1), scored(line, micro_batch_size=1000), rtol=0, atol=2e-3)
