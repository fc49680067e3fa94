"""Builds what a stage works with from its configuration: processes, policy, rewards, device."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.loading import as_config_error
from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.config.stages import TrainStage
from sfgrpo.errors import ConfigError
from sfgrpo.preflight.devices import device_of
from sfgrpo.preflight.models import check_base_model, check_reward_model
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.imports import without_collection
from sfgrpo.runtime.manifest import MANIFEST, model_digest, verify_manifest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sfgrpo.policies.adapter import Adapter, Base
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.policies.text_encoders import TextEncoder
    from sfgrpo.rewards import Reward

INDEX = "model_index.json"
"""File by which diffusers knows a pipeline."""
COMMIT = re.compile("[0-9a-f]{40}")

logger = logging.getLogger(__name__)


def make_accelerator(
    config: TrainStage, environment: Environment, sharding: Literal["none", "full"] = "none"
) -> Accelerator:
    """Join the processes of the run, before anything expensive; refuse work that does not divide among them."""
    with without_collection():
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=device_of(environment) == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=environment.timeout_s))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        # Each would train by itself, and all would write the same files.
        raise ConfigError(
            f"{launched} processes were launched (WORLD_SIZE), but accelerate sees {accelerator.num_processes}; set "
            "SFGRPO_DEVICE to cuda or cpu, as the processes are to compute on, and unset the ACCELERATE_ variables"
        )
    if sharding == "full" and accelerator.num_processes == 1:
        raise ConfigError(
            "launch.sharding: full spreads the frozen weights over processes, and there is one; use none, or a "
            "launch.num_processes of 2 or more"
        )
    BatchArithmetic(config=config, num_processes=accelerator.num_processes)
    return accelerator


def make_reward(config: RewardConfig, section: str = "reward") -> Reward:
    """Make the reward of a section of the parameters, by default that of the training."""
    from sfgrpo.rewards import PRETRAINED_REWARDS, build_reward

    if config.name in PRETRAINED_REWARDS:
        check_reward_model(config, section)
    with as_config_error(section):
        return build_reward(config.name, pretrained=config.pretrained, revision=config.revision)


def make_policy(
    config: PolicyConfig, seed: int, environment: Environment, sharding: Literal["none", "full"] = "none"
) -> SD3Policy:
    """Load the pipeline onto the device, with a fresh adapter of the seed; `full` sharding needs other processes."""
    with without_collection():
        from diffusers.utils.logging import disable_progress_bar

        from sfgrpo.policies.sd3 import SD3Policy

    disable_progress_bar()
    device = device_of(environment)
    base = base_of(config)
    options = dataclasses.asdict(config) | {"revision": None if base.is_folder else base.revision}
    with as_config_error("policy"):
        policy = SD3Policy.from_pretrained(**options, seed=seed, base=base)
    if sharding == "full":
        # First, so that no device ever holds more than its part and one block.
        policy.shard()
    policy.pipeline.to(device)
    return policy


def check_pretrained(config: PolicyConfig) -> None:
    """Refuse a base model that is absent, damaged or of a kind that is not supported, before it is loaded."""
    folder = Path(config.pretrained)
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    check_base_model(config)


def base_of(config: PolicyConfig) -> Base:
    """Return the base model of a configuration with what identifies it: a commit of the hub, or a folder's digest.

    Raises:
        ConfigError: It is no folder, and the hub has no such model or cannot be reached.
    """
    from sfgrpo.policies.adapter import Base

    folder = Path(config.pretrained)
    if (folder / INDEX).exists():
        return Base(name=config.pretrained, revision=f"sha256:{model_digest(folder)}")
    return Base(name=config.pretrained, revision=_hub_commit(config))


def policy_of(adapter: Adapter, config: PolicyConfig) -> PolicyConfig:
    """Return the configuration of the policy that an adapter belongs to: what its file knows wins over `config`."""
    known = dataclasses.replace(config, lora_rank=adapter.rank, lora_alpha=adapter.alpha, lora_targets=adapter.targets)
    if (base := adapter.base) is not None and not base.is_folder and base.name == config.pretrained:
        known = dataclasses.replace(known, revision=base.revision)
    asked = dataclasses.replace(config, lora_targets=tuple(sorted(config.lora_targets)))
    for name, theirs in dataclasses.asdict(known).items():
        if (ours := getattr(asked, name)) != theirs:
            logger.warning("policy.%s is %s, but the adapter was trained with %s, which is used", name, ours, theirs)
    return known


def _hub_commit(config: PolicyConfig) -> str:
    """Resolve the revision of a hub model, which may be a branch that moves, to a commit; offline by its cache."""
    from huggingface_hub import hf_hub_download

    if config.revision is not None and COMMIT.fullmatch(config.revision):
        return config.revision
    try:
        path = Path(hf_hub_download(config.pretrained, INDEX, revision=config.revision))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"policy.pretrained: {config.pretrained} at revision {config.revision} is neither in the hub's cache nor "
            f"to be had from the hub ({str(error).splitlines()[0]}); check name, revision, login and connection"
        ) from error
    # The cache has a folder for every commit.
    return path.parent.name


def use_threads(environment: Environment) -> None:
    """Set torch's CPU threads, where the environment asks for a number."""
    if environment.num_threads is not None:
        import torch

        torch.set_num_threads(environment.num_threads)


def make_text_encoders(pretrained: str, revision: str | None, max_sequence_length: int) -> tuple[TextEncoder, ...]:
    """Load what the text encoders of a base model are checked by; of the hub these are some small files."""
    from sfgrpo.policies.text_encoders import load_text_encoders

    try:
        return load_text_encoders(pretrained, revision=revision, max_sequence_length=max_sequence_length)
    except (OSError, ValueError) as error:
        if not Path(pretrained).is_dir():
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"policy.pretrained: the tokenizers of {pretrained} cannot be read ({reason}); give the folder of a whole "
            "Stable Diffusion 3 pipeline"
        ) from error
