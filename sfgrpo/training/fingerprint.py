"""Digests of everything that shapes a training or an evaluation: parameters, prompts, models and code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.prompts import prompts_digest
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.types import Prompt

PACKAGE = Path(__file__).parents[1]
SHAPING_CODE = (
    "checkpoint",
    "config",
    "evaluation",
    "factory.py",
    "geneval",
    "grpo",
    "policies",
    "prompts.py",
    "rewards",
    "shapes",
    "training",
    "types.py",
)
"""Folders and modules of this package that shape a result.

`dvc.yaml` names the same ones. The others only run or record: editing them changes no key and repeats no training.
"""


def run_key(config: TrainStage, prompts: Sequence[Prompt], evaluation_prompts: Sequence[Prompt]) -> str:
    """Digest all that shapes a training: configuration, prompts, models and code.

    Micro-batch sizes are left out. Like the number of processes they change nothing but rounding, and a run that ran
    out of memory must be able to go on with smaller ones.
    """
    shaping = {name: value for name, value in to_flat_dict(config).items() if not name.endswith(".micro_batch_size")}
    digests = [prompts_digest(prompts), prompts_digest(evaluation_prompts)]
    return _digest([json.dumps(shaping, sort_keys=True), *digests, *_code_and_models(config)])


def evaluation_scope(config: TrainStage, evaluation_prompts: Sequence[Prompt], device: str) -> str:
    """Digest all that shapes the evaluations of a training except the adapter, for one kind of device.

    Trainings that differ in other things share their evaluations, such as that of the untrained adapter.
    """
    shaping = {
        "policy": dataclasses.asdict(config.policy),
        "reward": dataclasses.asdict(config.reward),
        "evaluation": dataclasses.asdict(config.evaluation) | {"micro_batch_size": None, "every_num_updates": None},
        "sampling": dataclasses.asdict(config.sampling) if config.evaluation.training_sampler else None,
        "device": device,
    }
    lines = [json.dumps(shaping, sort_keys=True), prompts_digest(evaluation_prompts), *_code_and_models(config)]
    return _digest(lines)


def _code_and_models(config: TrainStage) -> list[str]:
    """Return one line with the digest of every file of the shaping code and of the models that a training loads."""
    models = [Path(folder) for folder in (config.policy.pretrained, config.reward.pretrained) if folder is not None]
    code = [f"{file.relative_to(PACKAGE).as_posix()} {sha256_of_file(file)}" for file in _shaping_files()]
    weights = [file for model in models for file in sorted(model.rglob("*.safetensors"))]
    return [*code, *(f"{file.name} {sha256_of_file(file)}" for file in weights)]


def _shaping_files() -> Iterator[Path]:
    for name in SHAPING_CODE:
        path = PACKAGE / name
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
