"""Time an update phase by phase beside the bare arithmetic of the same phases: `python -m benchmarks.update`.

On a CPU it times the shapes world; on a GPU the architecture of SD3.5-Medium with random weights. Every round runs all
phases, ours and bare in turn; the table shows medians over the rounds. Results are written after every round, so a run
that is cut off still counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.architectures import build_sd35_medium
from benchmarks.bare import BareModels, Call, RecordedReward, recorded_calls
from benchmarks.update_tables import Part, Timings, methods_of, results_of, tables_of
from sfgrpo.config.schema import SamplingConfig
from sfgrpo.config.stages import PromptsStage, TrainStage, load_config
from sfgrpo.factory import make_accelerator, make_policy, make_reward, use_threads
from sfgrpo.grpo.distributed import row_slices
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.scoring import StateScorer
from sfgrpo.grpo.update import Objective, make_scaler, update_policy
from sfgrpo.policies.sd3 import DTYPES, SD3Policy
from sfgrpo.preflight.devices import device_of
from sfgrpo.prompts import make_prompts
from sfgrpo.rewards import Reward
from sfgrpo.runtime.environment import Environment, read_environment
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Prompt, RolloutBatch, Trajectory, joined

RESULTS = Path("benchmarks/results")
CPU_PARAMS = Path("experiments/shapes/stepwise_unguided_geneval.yaml")
GPU_PARAMS = Path("params/sd35_medium.yaml")
MAX_ROUNDS = 5
ADAPTER_STD = 0.01
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


class Brightness(Reward):
    """Mean brightness of an image: a reward that costs nothing."""

    name = "brightness"

    def __call__(self, images: Any, prompts: Sequence[Prompt]) -> Tensor:
        return torch.from_numpy(images).float().mean(dim=(1, 2, 3))


@dataclasses.dataclass(kw_only=True)
class Bench:
    """A policy on a device, and everything an update of it needs."""

    config: TrainStage
    policy: SD3Policy
    reward: RecordedReward
    prompts: Sequence[Prompt]
    environment: Environment
    first_ratio: dict[str, float] = dataclasses.field(default_factory=dict)
    """Largest |ratio - 1| before the first optimiser step, by part."""

    def __post_init__(self) -> None:
        self._conditioning = self.policy.encode([prompt.text for prompt in self.prompts])
        self._trajectories: dict[float, Trajectory] = {}
        self._accelerator = make_accelerator(self.config, self.environment)

    def run(self, part: Part) -> PhaseClock:
        """Run one part and return its clock."""
        clock = PhaseClock(self.policy.device)
        getattr(self, f"_{part.stage}")(part, clock)
        return clock

    def bare(self) -> BareModels:
        """Return the models without our code around them."""
        return BareModels(self.policy, self.reward.reward, self._conditioning)

    @property
    def _sigmas_S(self) -> Tensor:
        return self.policy.sigmas(self.config.sampling.num_steps).to(self.policy.device)

    def _sampling(self, part: Part) -> SamplingConfig:
        return dataclasses.replace(self.config.sampling, guidance_scale=part.guidance_scale)

    def _rollout(self, part: Part, clock: PhaseClock) -> None:
        policy, rollout, sampling = self.policy, self.config.rollout, self._sampling(part)
        shape, device = policy.latent_shape, policy.device
        start = gaussian_noise(0, "start_noise", 0, range(rollout.prompts_per_update), shape)
        start = start.repeat_interleave(rollout.group_size, 0).to(device)
        noise = gaussian_noise(0, "step_noise", 0, range(rollout.num_images), (sampling.num_steps, *shape)).to(device)
        with clock("rollout"):
            trajectories = [
                roll_out(policy, self._conditioning[rows], start[rows], noise[rows], self._sigmas_S, sampling)
                for rows in row_slices(rollout.num_images, rollout.micro_batch_size)
            ]
        self._trajectories[part.guidance_scale] = joined(trajectories)

    def _score_final(self, part: Part, clock: PhaseClock) -> None:
        self._score(part, [self.config.sampling.num_steps], clock)

    def _score_states(self, part: Part, clock: PhaseClock) -> None:
        self._score(part, range(self.config.sampling.num_steps + 1), clock)

    def _score(self, part: Part, states: Sequence[int], clock: PhaseClock) -> None:
        rollout = self.config.rollout
        scorer = StateScorer(
            policy=self.policy,
            reward=self.reward,
            sigmas_S=self._sigmas_S,
            states=states,
            num_substeps=part.num_substeps,
            guidance_scale=part.guidance_scale,
            micro_batch_size=rollout.micro_batch_size,
        )
        first_rows = range(0, rollout.num_images, rollout.group_size)
        scorer.score(self._trajectories[part.guidance_scale], self._conditioning, self.prompts, first_rows, clock)

    def _update(self, part: Part, clock: PhaseClock) -> None:
        config, policy, num_images = self.config, self.policy, self.config.rollout.num_images
        update = dataclasses.replace(config.update, kl_coef=part.kl_coef)
        objective = Objective.of(policy, self._sampling(part), update, part.micro_batch_size)
        generator = torch.Generator().manual_seed(0)
        batch = RolloutBatch(
            trajectory=self._trajectories[part.guidance_scale],
            conditioning=self._conditioning,
            advantages_NK=torch.randn(num_images, config.sampling.num_steps, generator=generator).to(policy.device),
            constant_N=torch.zeros(num_images, dtype=torch.bool, device=policy.device),
        )
        # A learning rate of 0 does all the work and leaves the policy where it is.
        optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.0)
        scaler = make_scaler(config.policy.dtype, policy.device)
        with clock("update"):
            outcome = update_policy(policy, optimizer, batch, objective, self._accelerator, scaler)
        self.first_ratio[part.name] = outcome.metrics["policy/ratio_deviation_first_pass"]


def phase_of(call: Call, part: Part) -> str:
    """Return the phase that a call of the models belongs to."""
    if part.stage.startswith("score"):
        return call.kind if call.kind in ("decode", "reward") else "estimates"
    return part.stage


def measure(bench: Bench, parts: Sequence[Part], report: Callable[[Any, int], None], budget_s: float) -> None:
    """Run all parts round by round, until `MAX_ROUNDS` or until the next round would exceed the budget."""
    started = time.monotonic()
    flops = bench.bare().count_flops()
    calls: dict[Part, list[Call]] = {}
    timings: dict[tuple[Part, str], Timings] = {}
    for part in parts:  # Warm up, and note which calls of the models a part makes.
        with recorded_calls(bench.policy, bench.reward) as calls[part]:
            bench.run(part)
        for phase in dict.fromkeys(phase_of(call, part) for call in calls[part]):
            of_phase = [call for call in calls[part] if phase_of(call, part) == phase]
            timings[part, phase] = Timings(flops=sum(call.num_rows * flops[call.kind] for call in of_phase))
        print(f"warm-up  {part.name}: {time.monotonic() - started:.0f} s", flush=True)
    for number in range(1, MAX_ROUNDS + 1):
        round_started = time.monotonic()
        for part in parts:
            clock = bench.run(part)
            for phase in (phase for named, phase in timings if named == part):
                timings[part, phase].ours_s.append(clock.seconds[phase])
                timings[part, phase].peak_mb = max(timings[part, phase].peak_mb, clock.megabytes[phase])
        bare, clock = bench.bare(), PhaseClock(bench.policy.device)
        with bare.adapter_in_dtype():
            for (part, phase), timing in timings.items():
                of_phase = [call for call in calls[part] if phase_of(call, part) == phase]
                with clock(name := f"{part.name} {phase}"):
                    bare.run(of_phase)
                timing.bare_s.append(clock.seconds[name])
        report(timings, number)
        now = time.monotonic()
        if now - started + (now - round_started) > budget_s:
            break


def measured_ceiling(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    clock = PhaseClock(device)
    for _ in range(3):
        a @ b
    with clock("product"):
        for _ in range(10):
            a @ b
    return 10 * 2 * size**3 / clock.seconds["product"]


def build_bench(environment: Environment) -> Bench:
    """Build the shapes policy on a CPU, and SD3.5-Medium with random weights on a GPU."""
    device = torch.device(device_of(environment))
    if device.type == "cpu":
        config = load_config(TrainStage, CPU_PARAMS)
        pool = make_prompts(load_config(PromptsStage, CPU_PARAMS)).training
        policy = make_policy(config.policy, 0, environment)
        reward: Reward = make_reward(config.reward)
        rollout = config.rollout
    else:
        config = load_config(TrainStage, GPU_PARAMS)
        pool = make_prompts(load_config(PromptsStage, GPU_PARAMS)).training
        dtype = DTYPES[config.policy.dtype]
        policy = SD3Policy(
            build_sd35_medium(device, dtype),
            resolution=config.policy.resolution,
            max_sequence_length=config.policy.max_sequence_length,
            lora_rank=config.policy.lora_rank,
            lora_alpha=config.policy.lora_alpha,
            lora_targets=config.policy.lora_targets,
            dtype=dtype,
        )
        policy.pipeline.to(device)
        reward = Brightness()
        rollout = dataclasses.replace(config.rollout, prompts_per_update=1, group_size=8)
    update = dataclasses.replace(config.update, steps_per_update=1)
    config = dataclasses.replace(config, rollout=rollout, update=update)
    prompts = [pool[index] for index in range(config.rollout.prompts_per_update)]
    for weight in policy.adapter_parameters().values():
        # A fresh adapter does nothing, and would hide a difference between rollout and update.
        torch.nn.init.normal_(weight, std=ADAPTER_STD)
    return Bench(
        config=config,
        policy=policy,
        reward=RecordedReward(reward),
        prompts=[prompt for prompt in prompts for _ in range(config.rollout.group_size)],
        environment=environment,
    )


def machine_of(device: torch.device) -> str:
    """Return the name of the machine's processor, as the card or the kernel calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{torch.get_num_threads()} threads of {line.split(':', 1)[1].strip()}"
    return f"{torch.get_num_threads()} threads of {platform.machine()}"


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=480.0, help="when to stop, warm-up included (%(default)g)")
    parser.add_argument("--out", type=Path, help=f"JSON file ({RESULTS}/<machine>.json)")
    chosen = parser.parse_args()
    environment = read_environment()
    use_threads(environment)
    bench = build_bench(environment)
    device = bench.policy.device
    machine, ceiling = machine_of(device), measured_ceiling(device)
    out = chosen.out or RESULTS / f"{'-'.join(machine.lower().split())}.json"
    methods = methods_of(bench.config, full_scale=device.type == "cuda")
    parts = list(dict.fromkeys(part for method in methods for part in method.parts))
    about = {
        "machine": machine,
        "ceiling_tflop_s": ceiling / 1e12,
        "images": bench.config.rollout.num_images,
        "steps": bench.config.sampling.num_steps,
        "rollout_micro_batch": bench.config.rollout.micro_batch_size,
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(about), flush=True)

    def report(timings: Mapping[tuple[Part, str], Timings], num_rounds: int) -> None:
        results = results_of(timings, methods, bench.config.rollout.num_images, ceiling)
        record = about | {"rounds": num_rounds, "first_ratio_deviation": bench.first_ratio} | results
        atomic_write(out, json.dumps(record, indent=1) + "\n")
        print(f"\nafter {num_rounds} round(s)\n\n{tables_of(results)}", flush=True)

    measure(bench, parts, report, chosen.seconds)
    print(f"\nlargest |ratio - 1| of a first pass: {max(bench.first_ratio.values()):.2g}; results in {out}")


if __name__ == "__main__":
    main()
