"""Builds what a stage works with from its configuration: prompts, policy, rewards, trainer."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfgrpo.batches import BatchArithmetic
from sfgrpo.config import PromptsStage, TrainStage, to_flat_dict
from sfgrpo.environment import Environment
from sfgrpo.errors import ConfigError
from sfgrpo.files import sha256_of_file, verify_manifest
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.sections import PolicyConfig, RewardConfig
from sfgrpo.types import Prompt, Tag

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sfgrpo.policies.base import Policy
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.preemption import StopNotice
    from sfgrpo.rewards import Reward
    from sfgrpo.tracking import Tracker
    from sfgrpo.trainer import Trainer

GENEVAL = Path("data/geneval")
CODE = Path(__file__).parent


def make_prompts(config: PromptsStage) -> tuple[list[Prompt], list[Prompt]]:
    """Draws the training prompts and the evaluation prompts, none of which is trained on."""
    return _shapes_prompts(config) if config.prompts.source == "shapes" else _geneval_prompts(config)


def make_accelerator(config: TrainStage, environment: Environment) -> Accelerator:
    """Joins the processes of the run, before anything expensive; refuses work that does not divide among them."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=_device(environment) == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=environment.timeout_s))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        # Each would train by itself, and all would write the same files.
        raise ConfigError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate sees {accelerator.num_processes}; set "
            "SFGRPO_DEVICE to cuda or cpu, as the processes are to compute on, and unset the ACCELERATE_ variables"
        )
    BatchArithmetic(config=config, num_processes=accelerator.num_processes)
    return accelerator


def make_reward(config: RewardConfig) -> Reward:
    """Makes the training reward."""
    from sfgrpo.rewards import build_reward

    with blaming("reward"):
        return build_reward(config.name, pretrained=config.pretrained, revision=config.revision)


def make_trainer(
    config: TrainStage,
    accelerator: Accelerator,
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    evaluation_prompts: Sequence[Prompt],
    folder: Path,
    tracker: Tracker,
    notice: StopNotice,
    saved: Callable[[], None] = lambda: None,
) -> Trainer:
    """Makes the trainer, which goes on from the latest checkpoint in `folder`, if there is one.

    It heeds `notice`, and calls `saved` after every checkpoint.
    """
    from sfgrpo.rewards import build_reward
    from sfgrpo.trainer import Materials, Trainer

    materials = Materials(
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        reward=reward,
        verdict=build_reward("geneval_strict"),
        held_out=(build_reward("geneval"), build_reward("likeness")),
        folder=folder,
        tracker=tracker,
        notice=notice,
        saved=saved,
    )
    return Trainer(config, policy, materials, accelerator)


def make_policy(
    config: PolicyConfig, seed: int, environment: Environment, sharding: Literal["none", "full"] = "none"
) -> SD3Policy:
    """Loads the pipeline onto the device, with a fresh adapter of the seed; `full` sharding needs other processes."""
    from diffusers.utils.logging import disable_progress_bar

    from sfgrpo.policies.sd3 import SD3Policy

    disable_progress_bar()
    with blaming("policy"):
        policy = SD3Policy.from_pretrained(
            config.pretrained,
            revision=config.revision,
            dtype=config.dtype,
            resolution=config.resolution,
            max_sequence_length=config.max_sequence_length,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_targets=config.lora_targets,
            seed=seed,
        )
    if sharding == "full":
        # First, so that no device ever holds more than its part and one block.
        policy.shard()
    policy.pipeline.to(_device(environment))
    return policy


def _device(environment: Environment) -> str:
    """Chooses the device: where nothing else is asked for, each process of a node has a GPU of its own."""
    import torch

    if environment.device not in ("auto", "cuda"):
        return environment.device
    if environment.device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def check_pretrained(config: PolicyConfig) -> None:
    """Refuses a base model folder that is absent or damaged; a hub name, which has a revision, is diffusers' matter."""
    folder = Path(config.pretrained)
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    elif config.revision is None and not (folder / "model_index.json").exists():
        raise ConfigError(
            f"policy.pretrained: {config.pretrained} is no folder with a model_index.json; `git checkout` restores the "
            "shipped one, and a model of the hub needs its policy.revision"
        )


def run_key(config: TrainStage, prompts: Sequence[Prompt], evaluation_prompts: Sequence[Prompt]) -> str:
    """Digests all that shapes a training: configuration, prompts, models, and the code of this package.

    The sizes of micro-batches, as the number of processes, change nothing but rounding: a run that ran out of memory
    goes on with smaller ones.
    """
    shaping = {name: value for name, value in to_flat_dict(config).items() if not name.endswith(".micro_batch_size")}
    models = [Path(folder) for folder in (config.policy.pretrained, config.reward.pretrained) if folder is not None]
    code = sorted(path for path in CODE.rglob("*.py") if "study" not in path.relative_to(CODE).parts)
    files = [*code, *(file for model in models for file in sorted(model.rglob("*.safetensors")))]
    lines = [
        json.dumps(shaping, sort_keys=True),
        prompts_digest(prompts),
        prompts_digest(evaluation_prompts),
        *(f"{file.name} {sha256_of_file(file)}" for file in files),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def use_threads(environment: Environment) -> None:
    """Sets torch's CPU threads, where the environment asks for a number."""
    if environment.num_threads is not None:
        import torch

        torch.set_num_threads(environment.num_threads)


@contextlib.contextmanager
def blaming(parameter: str) -> Iterator[None]:
    """Words a `ValueError` of the block as the wrong value of a parameter that it is."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{parameter}: {error}") from error


def _drawing_seed(config: PromptsStage) -> int | tuple[int, int]:
    """Seeds the drawing of the training prompts: every edition in a way of its own, the first by the seed alone."""
    edition = config.prompts.edition
    return (config.seed, edition) if edition else config.seed


def _shapes_prompts(config: PromptsStage) -> tuple[list[Prompt], list[Prompt]]:
    from sfgrpo.shapes.prompts import sample_training_prompts, split_prompts

    with blaming("prompts.num_evaluation"):
        training, evaluation = split_prompts(config.prompts.num_evaluation, config.seed)
    with blaming("prompts.task_weights"):
        drawn = sample_training_prompts(
            training, config.prompts.task_weights, config.prompts.num_train, _drawing_seed(config)
        )
    return drawn, [prompt for prompts in evaluation.values() for prompt in prompts]


def _geneval_prompts(config: PromptsStage) -> tuple[list[Prompt], list[Prompt]]:
    from sfgrpo.geneval.prompts import training_prompts

    evaluation = read_prompts(GENEVAL / "evaluation_metadata.jsonl")
    counts: dict[Tag, int] = dict.fromkeys(config.prompts.num_evaluation, 0)
    for prompt in evaluation:
        counts[prompt.tag] += 1
    if counts != config.prompts.num_evaluation:
        raise ConfigError(
            f"prompts.num_evaluation: {config.prompts.num_evaluation} is not GenEval's own set; with prompts.source "
            f"geneval it must be {counts}"
        )
    names = (GENEVAL / "object_names.txt").read_text(encoding="utf-8").split("\n")
    with blaming("prompts.task_weights"):
        training = training_prompts(
            [name for name in names if name],
            evaluation,
            num_prompts=config.prompts.num_train,
            weights=config.prompts.task_weights,
            seed=_drawing_seed(config),
        )
    return list(training), evaluation
