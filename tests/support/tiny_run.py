"""A training of seconds in a folder of its own: tiny pipeline, few prompts, lightness as reward, no MLflow.

Run as a program it trains and records the numbers with which `test_stages.py` compares: the proof of no change.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML
from torch import Tensor

from sfgrpo.cli import main
from sfgrpo.rewards import REWARDS, Reward
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.tracking import mlflow_tracker
from sfgrpo.types import TAGS, Prompt
from tests.support.paths import ROOT
from tests.support.recording import RecordingTracker
from tests.support.tiny import LORA_TARGETS, Light, build_tiny_pipeline

RECORD = Path(__file__).parents[1] / "data" / "tiny_training.json"
RECORDED = ("reward/mean", "reward/std", "reward/start", "gain/mean", "policy/loss", "optim/grad_norm")

TINY: Mapping[str, Any] = {
    "seed": 0,
    "prompts.source": "shapes",
    "prompts.num_train": 16,
    "prompts.task_weights": dict.fromkeys(TAGS, 1) | {"single_object": 0, "counting": 0},
    "prompts.num_validation": dict.fromkeys(TAGS, 1),
    "prompts.num_evaluation": dict.fromkeys(TAGS, 1),
    "policy.pretrained": "models/tiny",
    "policy.dtype": "float32",
    "policy.lora_rank": 2,
    "policy.lora_alpha": 4,
    "policy.lora_targets": list(LORA_TARGETS),
    "sampling.sampler": "flow_sde",
    "sampling.num_steps": 3,
    "sampling.noise_level": 0.7,
    "sampling.guidance_scale": 1.0,
    "rollout.prompts_per_update": 2,
    "rollout.group_size": 3,
    "rollout.micro_batch_size": 6,
    "estimates.num_substeps": 2,
    "reward.name": "light",
    "advantage.credit": "joint",
    "advantage.std": "group",
    "advantage.clip": 5.0,
    "update.num_updates": 3,
    "update.steps_per_update": 2,
    "update.learning_rate": 1e-3,
    "update.lr_scheduler": "constant",
    "update.betas": [0.9, 0.999],
    "update.weight_decay": 1e-4,
    "update.max_grad_norm": 1.0,
    "update.clip_range": 3e-3,
    "update.kl_coef": 0.01,
    "update.kl_form": "exact",
    "update.trained_steps": None,
    "update.micro_batch_size": 3,
    "ema.decay": 0.9,
    "checkpoint.every_num_updates": 1,
    "checkpoint.keep": 2,
    "evaluation.num_steps": 2,
    "evaluation.guidance_scale": 1.0,
    "evaluation.images_per_prompt": 2,
    "evaluation.micro_batch_size": 12,
    "evaluation.every_num_updates": 2,
    "evaluation.training_sampler": True,
}
"""What differs from the shipped parameters, or must not follow them."""


def write_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """Write the shipped parameters with other values at some dotted paths, or with other keys."""
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = params
        for section in sections:
            place = place[section]
        place[name] = value
    # JSON is YAML.
    (folder / "params.yaml").write_text(json.dumps(params))


def build_tiny_project(folder: Path) -> None:
    """Make the folder: base model, parameters, prompts."""
    build_tiny_pipeline(folder / "models/tiny", blobs=True)
    write_manifest(folder / "models/tiny")
    write_params(folder, TINY)
    with inside(folder):
        assert main(["prompts"]) == 0


@contextlib.contextmanager
def inside(folder: Path, reward: type[Reward] = Light) -> Iterator[RecordingTracker]:
    """Run stages in the folder, with the reward "light" and a tracker in memory."""
    tracker = RecordingTracker()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFGRPO_DEVICE", "cpu")
        # Another test of this process may have left one.
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setitem(REWARDS, "light", reward)
        patch.setattr(mlflow_tracker, "MlflowTracker", lambda **settings: tracker)
        yield tracker


def failing(kind: str) -> type[Light]:
    """Return a reward that raises, or returns NaN or too few rewards, as soon as there is a checkpoint to keep."""

    class Failing(Light):
        def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
            rewards = super().__call__(images, prompts)
            if not list(Path(".scratch").glob("train-*/checkpoints/update-*")):
                return rewards
            if kind == "raise":
                raise RuntimeError("the lamp is broken")
            if kind == "nan":
                rewards[-1] = float("nan")
            return rewards[:-1] if kind == "count" else rewards

    return Failing


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of every update of a finished training, without times and memory."""
    history = json.loads((folder / "reports/train/history.json").read_text())
    return [
        {key: value for key, value in metrics.items() if not key.startswith(("time/", "memory/"))}
        for metrics in history
    ]


def numbers_of(folder: Path) -> list[dict[str, float]]:
    """Return the numbers that must not change unless the method does."""
    return [{key: metrics[key] for key in RECORDED} for metrics in read_history(folder)]


def record() -> None:
    """Train and write the numbers to `RECORD`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_project(folder)
        with inside(folder):
            assert main(["train"]) == 0
        RECORD.write_text(json.dumps(numbers_of(folder), indent=1) + "\n")


if __name__ == "__main__":
    record()
