"""The identity of runs and evaluations: digests of parameters, prompts, models and code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.errors import ConfigError
from sfgrpo.factory import base_of
from sfgrpo.paths import EVALUATION_PROMPTS, PROMPTS, RUN_PREFIX, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.types import Prompt

INPUTS = "inputs"
"""Folder, below that of a run, with what it was started with."""
PROVENANCE = "provenance.json"
FINGERPRINT = "fingerprint.json"
MODEL_FILE = "config.json"
"""In the folder of every model of a reward."""
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The identity of a run and what it starts from."""

    fingerprint: Mapping[str, str]
    """Digests of parameters, prompts, models and code; a run that goes on from another one has that one's name too."""
    folder: Path
    prompt_files: Sequence[Path]
    """Of the prompts below, in their order."""
    prompts: Sequence[Prompt]
    validation_prompts: Sequence[Prompt]
    """By which the best adapter is selected."""
    evaluation_prompts: Sequence[Prompt]
    """Kept out of the training."""
    predecessor: Path | None = None
    """Folder of the run of other code from whose newest checkpoint this one starts."""

    @property
    def key(self) -> str:
        """Digest of the fingerprint."""
        return run_key(self.fingerprint)

    @property
    def code_change(self) -> str | None:
        """Code of the predecessor and of this run, if they differ."""
        old = self.fingerprint.get("predecessor_code")
        return None if old is None else f"{old[:16]} -> {self.fingerprint['code'][:16]}"

    @classmethod
    def of(cls, config: TrainStage, environment: Environment, inputs: Path | None, *, accept_code_change: bool) -> Self:
        """Identify the run of a configuration, or the one with these inputs; raise `ConfigError` if it is another."""
        files = [(inputs or PROMPTS) / path.name for path in (TRAINING_PROMPTS, VALIDATION_PROMPTS, EVALUATION_PROMPTS)]
        if inputs is not None and not files[1].exists():
            # A run of an older version, which selected by the evaluation prompts.
            raise _other_run_error(inputs, ["code", "prompts"])
        prompts, validation_prompts, evaluation_prompts = prompt_sets = [read_prompts(file) for file in files]
        fingerprint, folder, predecessor = run_fingerprint(config, prompt_sets), None, None
        if inputs is not None:
            # A run of an older version has recorded none.
            path = inputs / FINGERPRINT
            recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            different = [name for name in fingerprint if fingerprint[name] != recorded.get(name)]
            if not different:
                fingerprint, folder = recorded, inputs.parent
            elif different == ["code"] and accept_code_change:
                predecessor = inputs.parent
                # Part of the key: a run that changed its code midway is not the one that today's code would make.
                fingerprint |= {"predecessor": predecessor.name, "predecessor_code": recorded["code"]}
            else:
                raise _other_run_error(inputs, different)
        return cls(
            fingerprint=fingerprint,
            folder=folder or environment.scratch_dir / f"{RUN_PREFIX}{run_key(fingerprint)[:16]}",
            prompt_files=files,
            prompts=prompts,
            validation_prompts=validation_prompts,
            evaluation_prompts=evaluation_prompts,
            predecessor=predecessor,
        )


def run_fingerprint(config: TrainStage, prompt_sets: Sequence[Sequence[Prompt]]) -> dict[str, str]:
    """Return the digests of all that shapes a training: parameters, prompts, models and code.

    The evaluation prompts, which shape nothing, belong to them: what is published names them as kept out.

    Micro-batch sizes are left out. Like the number of processes they change nothing but rounding, and a run that ran
    out of memory must be able to go on with smaller ones.
    """
    shaping = {name: value for name, value in to_flat_dict(config).items() if not name.endswith(".micro_batch_size")}
    return {
        "parameters": _digest([json.dumps(shaping, sort_keys=True)]),
        "prompts": _digest([prompts_digest(prompts) for prompts in prompt_sets]),
        "models": _models_digest(config),
        "code": _code_digest(),
    }


def run_key(fingerprint: Mapping[str, str]) -> str:
    """Return the key of the run with this fingerprint."""
    return _digest([json.dumps(fingerprint, sort_keys=True)])


def evaluation_fingerprint(config: TrainStage, prompts: Sequence[Prompt], device: str) -> str:
    """Digest all that shapes the evaluations of a training on `prompts` except the adapter, for one kind of device.

    Trainings that differ in other things share their evaluations, such as that of the untrained adapter.
    """
    shaping = {
        "policy": dataclasses.asdict(config.policy),
        "reward": dataclasses.asdict(config.reward),
        "evaluation": dataclasses.asdict(config.evaluation) | {"micro_batch_size": None, "every_num_updates": None},
        "sampling": dataclasses.asdict(config.sampling) if config.evaluation.training_sampler else None,
        "device": device,
    }
    digests = prompts_digest(prompts), _models_digest(config), _code_digest()
    return _digest([json.dumps(shaping, sort_keys=True), *digests])


def _models_digest(config: TrainStage) -> str:
    folder = Path(config.reward.pretrained or "")
    # A folder that holds no model may be the root of the disk.
    is_model = config.reward.pretrained is not None and (folder / MODEL_FILE).is_file()
    weights = sorted(folder.rglob("*.safetensors")) if is_model else []
    reward = [f"{file.name} {sha256_of_file(file)}" for file in weights]
    return _digest([base_of(config.policy).revision, *reward])


def _code_digest() -> str:
    files = [file for name in SHAPING_CODE for file in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return _digest([f"{file.relative_to(PACKAGE).as_posix()} {sha256_of_file(file)}" for file in files])


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _other_run_error(inputs: Path, different: Sequence[str]) -> ConfigError:
    commit = json.loads((inputs / PROVENANCE).read_text(encoding="utf-8"))["git_commit"]
    cure = ", go on with today's code by --accept-code-change" if list(different) == ["code"] else ""
    return ConfigError(
        f"run {inputs.parent.name} was started with other {' and '.join(different)}, and would not be the same run; "
        f"check out commit {commit}{cure}, or start anew without --resume"
    )
