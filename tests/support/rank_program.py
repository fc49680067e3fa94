"""Distributed trainings of the tiny policy, which save what they saw: `rank_program.py FOLDER NUMBER-SHARDING...`.

Each of the arguments is a run of so many ranks, into a folder of this name, and trains every case. The ranks are forks
of this process, since each would take seconds to import torch and diffusers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.multiprocessing import start_processes

import sfgrpo.training.collector
from sfgrpo.evaluation.evaluate import evaluate_policy, protocol_of
from sfgrpo.evaluation.periodic import EvaluationPaths
from sfgrpo.grpo.advantages import Advantages
from sfgrpo.grpo.distributed import agree
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.tracking.base import SilentTracker
from sfgrpo.training.trainer import Trainer, TrainerInputs
from tests.support.recording import RecordingTracker
from tests.support.stores import free_port
from tests.support.tiny import Light, make_tiny_policy
from tests.support.trainings import EVALUATION, GROUP_SIZE, TRAINING, Half, make_evaluator, small_config

NUM_PROMPTS, NUM_UPDATES = 4, 3
CASES: Mapping[str, Mapping[str, Any]] = {
    # Four processes have three of the twelve images each: groups of six span two of them.
    "stepwise": {"estimates": {"num_substeps": 2}},
    "terminal": {"advantage": {"credit": "terminal"}, "update": {"kl_coef": 0.01}},
    "guided": {"sampling": {"guidance_scale": 3.0}, "estimates": {"num_substeps": 1}},
    "start_and_end": {"estimates": {"num_substeps": 3, "states": [0, 3]}},
}


class SometimesFlat(Light):
    """Light, but blind to some prompts, so that some groups are constant and processes differ in their work."""

    def __call__(self, images, prompts):
        seen = torch.tensor(["two" not in prompt.text for prompt in prompts])
        return super().__call__(images, prompts) * seen


def train(folder: Path, case: str, sharding: str, accelerator: Accelerator) -> None:
    """Train one case; the first rank saves advantages, adapter, metrics and evaluations."""
    sections = {name: dict(values) for name, values in CASES[case].items()}
    sections["rollout"] = {"prompts_per_update": NUM_PROMPTS, "group_size": 2 * GROUP_SIZE, "micro_batch_size": 3}
    sections["update"] = sections.get("update", {}) | {"num_updates": NUM_UPDATES, "micro_batch_size": 3}
    sections["evaluation"] = {"images_per_prompt": 3, "micro_batch_size": 2, "training_sampler": True}
    config = small_config(**sections)
    policy = make_tiny_policy()
    if sharding == "full":
        policy.shard()
    start = {name: value.detach().clone() for name, value in policy.adapter_parameters().items()}
    seen: list[Advantages] = []
    computed = sfgrpo.training.collector.group_advantages

    def watched(*arguments: Any, **options: Any) -> Advantages:
        seen.append(computed(*arguments, **options))
        return seen[-1]

    sfgrpo.training.collector.group_advantages = watched
    is_first = accelerator.is_main_process
    reward, protocol = SometimesFlat(), protocol_of(config.evaluation)
    start_evaluation = evaluate_policy(
        policy, EVALUATION, (Light(),), protocol, is_correct=Half(), accelerator=accelerator
    )
    inputs = TrainerInputs(
        prompts=TRAINING,
        reward=reward,
        evaluator=make_evaluator(config, Half(), reward),
        paths=EvaluationPaths(
            folder=folder / f"{case}-run",
            store=folder / f"{case}-evaluations",
            fingerprint=case,
            # No process evaluates in the background, so all is left to the end.
            in_background=case == "terminal",
        ),
        tracker=RecordingTracker() if is_first else SilentTracker(),
        shutdown=GracefulShutdown(grace_s=60),
    )
    trainer = Trainer(config, policy, inputs, accelerator)
    try:
        trainer.run()
    finally:
        sfgrpo.training.collector.group_advantages = computed
    if is_first:
        record = {
            "advantages": [each.values_NK for each in seen],
            "constant": [each.constant_N for each in seen],
            "start": start,
            "adapter": {name: value.detach() for name, value in policy.adapter_parameters().items()},
            "history": trainer.history,
            "evaluations": trainer.evaluations,
            "thumbnails": torch.from_numpy(start_evaluation.thumbnails_PGHWC),
            "scores": torch.from_numpy(start_evaluation.rewards_PG["light"]),
            "grid": sorted((folder / f"{case}-run").glob("samples_*.png"))[-1].read_bytes(),
        }
        torch.save(record, folder / f"{case}.pt")


def run_rank(rank: int, folder: Path, number: int, sharding: str, port: int) -> None:
    """Train every case as one of the ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == number
    assert agree("the same", accelerator)
    assert agree(str(accelerator.process_index), accelerator) == (number == 1)
    for case in CASES:
        train(folder, case, sharding, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        number, sharding = name.split("-")
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        arguments = (folder, int(number), sharding, free_port())
        start_processes(run_rank, arguments, nprocs=int(number), start_method="fork")
