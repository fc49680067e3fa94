"""Small trainings for tests: their configuration, rewards, trainer and working directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ruamel.yaml import YAML

from sfgrpo.config.loading import validated
from sfgrpo.config.stages import TrainStage
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.periodic import EvaluationPaths
from sfgrpo.policies.base import Policy
from sfgrpo.prompts import write_prompts
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.tracking.base import Tracker
from sfgrpo.training.trainer import Trainer, TrainerInputs
from tests.support.paths import ROOT
from tests.support.recording import RecordingTracker
from tests.support.tiny import LORA_TARGETS, Light, build_tiny_pipeline, make_tiny_policy, tiny_prompts

NUM_UPDATES, NUM_STEPS, GROUP_SIZE, NUM_IMAGES = 5, 3, 3, 6
NUM_LONG_UPDATES = 30
TRAINING, EVALUATION = tiny_prompts(6)[:4], tiny_prompts(6)[4:]

SMALL: dict[str, dict[str, Any]] = {
    "policy": {"dtype": "float32", "lora_rank": 2, "lora_alpha": 4, "lora_targets": list(LORA_TARGETS)},
    "sampling": {"sampler": "flow_sde", "num_steps": NUM_STEPS, "noise_level": 0.7, "guidance_scale": 1.0},
    "rollout": {"prompts_per_update": 2, "group_size": GROUP_SIZE, "micro_batch_size": NUM_IMAGES},
    "estimates": {"num_substeps": 2},
    "reward": {"name": "geneval"},
    "advantage": {"credit": "joint", "std": "group"},
    "update": {
        "num_updates": NUM_UPDATES,
        "steps_per_update": 2,
        "learning_rate": 1e-2,
        "clip_range": 3e-3,
        "kl_coef": 0.0,
        "trained_steps": None,
        "micro_batch_size": GROUP_SIZE,
    },
    "ema": {"decay": 0.5},
    "checkpoint": {"every_num_updates": 2, "keep": 9},
    "evaluation": {
        "num_steps": 2,
        "guidance_scale": 1.0,
        "images_per_prompt": 1,
        "micro_batch_size": 8,
        "every_num_updates": 2,
    },
}
"""What differs from the shipped parameters, or must not follow them."""


def small_params(**changes: dict[str, Any]) -> dict[str, Any]:
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    for sections in (SMALL, changes):
        for name, values in sections.items():
            params[name] |= values
    return params


def small_config(**changes: dict[str, Any]) -> TrainStage:
    params = small_params(**changes)
    return validated(TrainStage, {field.name: params[field.name] for field in dataclasses.fields(TrainStage)}, "test")


class Half(Light):
    """Finds the first half of the images right, by default, and remembers all that it was shown."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)
        self.shown: list[Any] = []

    def __call__(self, images, prompts):
        self.shown.append(images)
        share = self.shares.pop(0) if self.shares else 0.5
        return (torch.arange(len(images)) < share * len(images)).float()


class Stopping(RecordingTracker):
    """Stops the process's work, as Ctrl-C does, when an update is recorded."""

    def __init__(self, update: int) -> None:
        super().__init__()
        self.update = update

    def log_metrics(self, metrics, step):
        if "reward/mean" in metrics and step == self.update:
            raise KeyboardInterrupt
        super().log_metrics(metrics, step)


def make_evaluator(config: TrainStage, is_correct: Reward, reward: Reward | None = None) -> Evaluator:
    """Make the evaluator of a configuration with another verdict, by which it selects, and the trained reward alone."""
    reward = reward or Light()
    return dataclasses.replace(
        Evaluator.of(config, EVALUATION, reward),
        is_correct=is_correct,
        rewards=(reward,),
        selected_by="geneval/overall",
    )


def trainer_in(
    folder: Path,
    config: TrainStage | None = None,
    policy: Policy | None = None,
    *,
    reward: Reward | None = None,
    is_correct: Reward | None = None,
    store: Path | None = None,
    in_background: bool = False,
    tracker: Tracker | None = None,
    shutdown: GracefulShutdown | None = None,
) -> Trainer:
    """Make the trainer of a small run in a folder."""
    config, reward = config or small_config(), reward or Light()
    inputs = TrainerInputs(
        prompts=TRAINING,
        reward=reward,
        evaluator=make_evaluator(config, is_correct or Half(), reward),
        paths=EvaluationPaths(
            folder=folder, store=store or folder / "evaluations", fingerprint="test", in_background=in_background
        ),
        tracker=tracker or RecordingTracker(),
        shutdown=shutdown or GracefulShutdown(grace_s=60),
    )
    return Trainer(config, policy or make_tiny_policy(), inputs, Accelerator())


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out what the clock and the operating system said."""
    return [
        {
            key: timeless([value])[0] if isinstance(value, dict) else value
            for key, value in record.items()
            if not key.startswith(("time/", "memory/"))
        }
        for record in records
    ]


def adapter_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.adapter_parameters().items()}


def lay_out(folder: Path) -> Path:
    """Makes a working directory in which `python -m sfgrpo train` finds a small run, and GenEval something correct."""
    folder.mkdir()
    build_tiny_pipeline(folder / "pipeline", blobs=True)
    write_manifest(folder / "pipeline")
    single = all_prompts()["single_object"]
    easy = [prompt for prompt in single if prompt.include[0].class_name in ("square", "triangle")]
    others = [prompt for prompt in single if prompt not in easy and prompt not in TRAINING]
    for name, prompts in (("train", TRAINING), ("validation", easy), ("evaluation", others)):
        write_prompts(folder / f"data/prompts/{name}.jsonl", prompts)
    params = small_params(
        policy={"pretrained": "pipeline"},
        rollout={"group_size": 12, "micro_batch_size": 24},
        update={"num_updates": NUM_LONG_UPDATES, "clip_range": 0.1, "micro_batch_size": 12},
        checkpoint={"every_num_updates": 1, "keep": 2},
        evaluation={"every_num_updates": 6, "images_per_prompt": 16, "micro_batch_size": 32},
    )
    # JSON is YAML.
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder
