"""Time an update with and without each saving of the method: `python -m benchmarks.update_cost [ROW]`.

ROW is a parameter file of experiments/shapes. The naive update scores every state of every image by itself, always with
all substeps, from a velocity of its own, and encodes the prompts anew; the savings are then switched on one after the
other. Variants take turns, and medians over the rounds are printed, because machines are noisy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sfgrpo.config.stages import PromptsStage, TrainStage, load_config
from sfgrpo.factory import make_accelerator, make_policy, make_reward, use_threads
from sfgrpo.grpo import scoring
from sfgrpo.grpo.distributed import row_slices
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.scoring import StateScorer, share_start_rewards
from sfgrpo.grpo.update import Objective, make_scaler, update_policy
from sfgrpo.policies.base import Policy
from sfgrpo.prompts import make_prompts
from sfgrpo.rewards import Reward
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Conditioning, Prompt, RolloutBatch, Trajectory, joined

PHASES = ("encode", "rollout", "estimates", "decode", "reward", "update")
ROUNDS = 3
SUBSTEPS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The savings that an update makes."""

    stepwise: bool = True
    num_substeps: int = SUBSTEPS
    shared_start: bool = True
    capped: bool = True
    mixed_batches: bool = True
    kept_velocity: bool = True
    kept_texts: bool = True
    dropped_groups: bool = True
    states: tuple[int, ...] | None = None


NAIVE = Variant(
    shared_start=False, capped=False, mixed_batches=False, kept_velocity=False, kept_texts=False, dropped_groups=False
)
SAVINGS: Mapping[str, Mapping[str, Any]] = {
    "1. start state estimated once a group": {"shared_start": True},
    "2. substeps capped by the steps that remain": {"capped": True},
    "3. states of all noise levels in one batch": {"mixed_batches": True},
    "4. first velocity kept from the rollout": {"kept_velocity": True},
    "5. prompts encoded once a run": {"kept_texts": True},
    "6. constant groups left out of the update": {"dropped_groups": True},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The inputs of an update."""

    config: TrainStage
    policy: Policy
    reward: Reward
    prompts: Sequence[Prompt]

    def run(self, variant: Variant) -> dict[str, float]:
        """Do one update and return the seconds of its phases."""
        config, policy, clock = self.config, self.policy, PhaseClock()
        sampling = config.sampling
        texts = [prompt.text for prompt in self.prompts]
        with clock("encode") if not variant.kept_texts else contextlib.nullcontext():
            conditioning = policy.encode(texts)
        objective = Objective.of(policy, sampling, config.update, config.update.micro_batch_size)
        groups, group_size = config.rollout.prompts_per_update, config.rollout.group_size
        start = gaussian_noise(0, "start_noise", 0, range(groups), policy.latent_shape)
        noise = gaussian_noise(0, "step_noise", 0, range(len(texts)), (sampling.num_steps, *policy.latent_shape))
        with clock("rollout"):
            start = start.repeat_interleave(group_size, 0)
            trajectory = joined(
                [
                    roll_out(policy, conditioning[rows], start[rows], noise[rows], objective.sigmas_S, sampling)
                    for rows in row_slices(len(texts), config.rollout.micro_batch_size)
                ]
            )
        if variant.stepwise:
            rewards_NS = self._scored(variant, trajectory, conditioning, objective.sigmas_S, clock)
        else:
            scorer = self._scorer(variant, objective.sigmas_S, (sampling.num_steps,))
            rewards_NS = scorer.score(trajectory, conditioning, self.prompts, (), clock)
        by_group = rewards_NS.reshape(groups, -1)
        constant = (by_group.amax(1) == by_group.amin(1)).repeat_interleave(group_size)
        advantages = torch.randn(len(texts), sampling.num_steps, generator=torch.Generator().manual_seed(0))
        batch = RolloutBatch(
            trajectory=trajectory,
            conditioning=conditioning,
            advantages_NK=advantages,
            constant_N=constant if variant.dropped_groups else torch.zeros_like(constant),
        )
        optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-9)
        accelerator = make_accelerator(config, read_environment())
        with clock("update"):
            update_policy(
                policy, optimizer, batch, objective, accelerator, make_scaler(config.policy.dtype, policy.device)
            )
        return {phase: clock.seconds.get(phase, 0.0) for phase in PHASES}

    def _scored(
        self, variant: Variant, trajectory: Trajectory, conditioning: Conditioning, sigmas_S: Tensor, clock: PhaseClock
    ) -> Tensor:
        config = self.config
        num_steps = config.sampling.num_steps
        group_size = config.rollout.group_size if variant.shared_start else 1
        states = variant.states or tuple(range(num_steps + 1))
        if not variant.kept_velocity:
            with clock("estimates"):
                self._velocities_anew(trajectory, conditioning, sigmas_S, range(num_steps))
        with _substeps(variant.capped):
            # The image itself comes with every call; state by state only the last call is one that needs it.
            calls = [states] if variant.mixed_batches else [(state, num_steps) for state in states[:-1]]
            clocks = [PhaseClock() for _ in calls[1:]] + [clock]
            scored = [
                self._scorer(variant, sigmas_S, part).score(
                    trajectory, conditioning, self.prompts, range(0, len(self.prompts), group_size), part_clock
                )
                for part, part_clock in zip(calls, clocks, strict=True)
            ]
        for (state, *_), part_clock in zip(calls, clocks[:-1], strict=False):
            # Leaves out what the image itself took.
            images = len(self.prompts) // (group_size if state == 0 else 1)
            share = images / (images + len(self.prompts))
            clock.seconds["estimates"] += part_clock.seconds["estimates"]
            for phase in ("decode", "reward"):
                clock.seconds[phase] += share * part_clock.seconds[phase]
        rewards_NS = torch.cat([part[:, :1] for part in scored[:-1]] + [scored[-1]], dim=1)
        return share_start_rewards(rewards_NS, states, group_size)

    def _scorer(self, variant: Variant, sigmas_S: Tensor, states: Sequence[int]) -> StateScorer:
        return StateScorer(
            policy=self.policy,
            reward=self.reward,
            sigmas_S=sigmas_S,
            states=states,
            num_substeps=variant.num_substeps,
            guidance_scale=self.config.sampling.guidance_scale,
            micro_batch_size=self.config.rollout.micro_batch_size,
        )

    @torch.no_grad()
    def _velocities_anew(
        self, trajectory: Trajectory, conditioning: Conditioning, sigmas_S: Tensor, states: Sequence[int]
    ) -> None:
        scale, size = self.config.sampling.guidance_scale, self.config.rollout.micro_batch_size
        for state in states:
            for rows in row_slices(len(conditioning), size):
                x = trajectory.latents_NSCHW[rows, state]
                self.policy.velocity(x, sigmas_S[state].expand(len(x)), conditioning[rows], scale)


@contextlib.contextmanager
def _substeps(capped: bool) -> Iterator[None]:
    """Unless capped, estimates take all substeps even if fewer schedule steps remain."""

    def uncapped(sigmas_S: Tensor, num_substeps: int) -> list[Tensor]:
        return [sigma * torch.linspace(1, 0, num_substeps + 1) for sigma in sigmas_S[:-1]]

    with contextlib.nullcontext() if capped else mock.patch.object(scoring, "substep_sigmas", uncapped):
        yield


def variants(states: tuple[int, ...] | None) -> dict[str, Variant]:
    """Return the variants: Flow-GRPO, naive Stepwise, the savings added up, and cheaper estimates on top."""
    named = {"Flow-GRPO": Variant(stepwise=False), f"Stepwise, T' = {SUBSTEPS}, naive": NAIVE}
    saved = NAIVE
    for name, change in SAVINGS.items():
        saved = dataclasses.replace(saved, **change)
        named[name] = saved
    return named | {
        "T' = 2": dataclasses.replace(saved, num_substeps=2),
        "T' = 1": dataclasses.replace(saved, num_substeps=1),
        "T' = 1, states of the trained steps": dataclasses.replace(saved, num_substeps=1, states=states),
        "T' = 1, every other state": dataclasses.replace(saved, num_substeps=1, states=(0, 2, 4, 6, 8)),
    }


def table(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Lay the seconds out as Markdown, with the ratio to the first row."""
    base = sum(next(iter(seconds.values())).values())
    lines = [["Update", *PHASES, "total s", "x Flow-GRPO"], ["---", *["---:"] * (len(PHASES) + 2)]]
    for name, phases in seconds.items():
        total = sum(phases.values())
        cells = [f"{phases[phase]:.2f}" if phases[phase] else "-" for phase in PHASES]
        lines.append([name, *cells, f"{total:.2f}", f"{total / base:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(run: Callable[[Variant], dict[str, float]], named: Mapping[str, Variant]) -> dict[str, dict[str, float]]:
    """Run all variants in turn, `ROUNDS` times after a warm-up, and return the median seconds of every phase."""
    run(next(iter(named.values())))
    rounds = [{name: run(variant) for name, variant in named.items()} for _ in range(ROUNDS)]
    return {
        name: {phase: statistics.median(each[name][phase] for each in rounds) for phase in PHASES} for name in named
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_cost", description=str(__doc__).split("\n\n")[1])
    parser.add_argument(
        "row", nargs="?", default="stepwise_unguided_geneval", help="of experiments/shapes (%(default)s)"
    )
    path, environment = Path("experiments/shapes") / f"{parser.parse_args().row}.yaml", read_environment()
    config = load_config(TrainStage, path)
    use_threads(environment)
    pool = make_prompts(load_config(PromptsStage, path)).training
    prompts = [pool[index] for index in range(config.rollout.prompts_per_update)]
    bench = Bench(
        config=config,
        policy=make_policy(config.policy, 0, environment),
        reward=make_reward(config.reward),
        prompts=[prompt for prompt in prompts for _ in range(config.rollout.group_size)],
    )
    print(table(measured(bench.run, variants(config.estimates.states))))


if __name__ == "__main__":
    main()
