"""How a registered version is evaluated, in a promotion and in a recheck alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.factory import make_policy, make_reward
from sfgrpo.promotion.history import experiment_of
from sfgrpo.registry.package import Package
from sfgrpo.runtime.environment import Environment
from sfgrpo.tracking.base import Tracker, ending
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation.evaluate import Evaluation, SamplingProtocol
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetup:
    """Prompts, sampling and rewards; the same for all models that are compared."""

    prompts: Sequence[Prompt]
    protocol: SamplingProtocol
    rewards: Sequence[Reward]
    """The training reward and the held-out one."""
    shown: Sequence[int] = ()
    """Positions of the prompts whose images are kept."""


@contextlib.contextmanager
def tracked_run(environment: Environment, model: str, name: str) -> Iterator[Tracker]:
    """Open an MLflow run among the decisions on a model, and end it with the block."""
    from sfgrpo.tracking.mlflow_tracker import MlflowTracker

    tracker = MlflowTracker(uri=environment.tracking_uri, experiment=experiment_of(model), run_name=name)
    with ending(tracker):
        tracker.open()
        yield tracker


def make_rewards(training: RewardConfig, held_out: RewardConfig) -> tuple[Reward, Reward]:
    """Make the training reward and the held-out one."""
    return make_reward(training), make_reward(held_out, "promotion.held_out")


def load_policy(package: Package, environment: Environment) -> SD3Policy:
    """Load the base pipeline of a version, with an adapter of the version's shape that has no effect yet."""
    from safetensors import safe_open

    settings = package.settings
    with safe_open(package.adapter / settings["adapter_file"], framework="pt") as file:
        lora = json.loads(file.metadata()["lora_adapter_metadata"])
    config = PolicyConfig(
        pretrained=package.pretrained,
        revision=settings["revision"],
        dtype=settings["dtype"],
        resolution=settings["resolution"],
        max_sequence_length=settings["max_sequence_length"],
        lora_rank=lora["transformer.r"],
        lora_alpha=lora["transformer.lora_alpha"],
        lora_targets=tuple(sorted(lora["transformer.target_modules"])),
    )
    return make_policy(config, 0, environment)


def evaluate(policy: SD3Policy, setup: EvaluationSetup) -> Evaluation:
    """Draw all prompts with a policy and score the images."""
    from sfgrpo.evaluation.evaluate import evaluate_policy

    return evaluate_policy(policy, setup.prompts, setup.rewards, setup.protocol, shown=setup.shown)
