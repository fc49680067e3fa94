"""Configuration of each stage of the pipeline: its sections, checks across them, and loading.

The fields of a stage are the top-level keys of `params.yaml` that it reads, and its `params` in `dvc.yaml`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args

from sfgrpo.config import schema
from sfgrpo.config.loading import read_parameters, unknown_key, validated
from sfgrpo.config.pretrain_schema import PretrainConfig, PretrainRewardConfig
from sfgrpo.config.ranges import Seed
from sfgrpo.config.schema import section
from sfgrpo.errors import ConfigError
from sfgrpo.types import TAGS


@section
class PretrainStage:
    """Parameters of `pretrain`, which makes the base model."""

    seed: Seed
    pretrain: PretrainConfig


@section
class PretrainRewardStage:
    """Parameters of `pretrain_reward`, which makes the model behind the reward `clip`."""

    seed: Seed
    pretrain_reward: PretrainRewardConfig


@section
class PromptsStage:
    """Parameters of `prompts`, which writes the prompt sets."""

    seed: Seed
    prompts: schema.PromptsConfig


@section
class TrainStage:
    """Parameters of `train`, which trains the adapter."""

    seed: Seed
    policy: schema.PolicyConfig
    sampling: schema.SamplingConfig
    rollout: schema.RolloutConfig
    estimates: schema.EstimatesConfig
    reward: schema.RewardConfig
    advantage: schema.AdvantageConfig
    update: schema.UpdateConfig
    ema: schema.EmaConfig
    checkpoint: schema.CheckpointConfig
    evaluation: schema.EvaluationConfig

    def __post_init__(self) -> None:
        if conflicts := [*_sampling_conflicts(self), *batch_conflicts(self), *_schedule_conflicts(self)]:
            raise ValueError("\n".join(conflicts))

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """Denoising steps in the objective: those listed, or all but the last."""
        return self.update.trained_steps or tuple(range(self.sampling.num_steps - 1))

    @property
    def scored_states(self) -> tuple[int, ...]:
        """States whose reward the credit needs: those listed, or all; under terminal credit the image alone."""
        last = self.sampling.num_steps
        return (last,) if self.advantage.credit == "terminal" else self.estimates.states or tuple(range(last + 1))


@section
class EvaluateStage:
    """Parameters of `evaluate`, which compares best and last adapter with the base model."""

    seed: Seed
    policy: schema.PolicyConfig
    evaluation: schema.EvaluationConfig
    reward: schema.RewardConfig


@section
class RegisterStage:
    """Parameters of `register`, which records the trained policy as a model version."""

    policy: schema.PolicyConfig
    registry: schema.RegistryConfig
    evaluation: schema.EvaluationConfig
    serving: schema.ServingConfig

    def __post_init__(self) -> None:
        if conflicts := list(_serving_conflicts(self)):
            raise ValueError("\n".join(conflicts))


@section
class PromoteStage:
    """Parameters of `promote`, which decides whether a registered version becomes champion."""

    evaluation: schema.EvaluationConfig
    reward: schema.RewardConfig
    registry: schema.RegistryConfig
    promotion: schema.PromotionConfig

    def __post_init__(self) -> None:
        if conflicts := list(_promotion_conflicts(self)):
            raise ValueError("\n".join(conflicts))


@section
class RegistryStage:
    """Parameters of `rollback` and `recheck`, which concern only the champion."""

    registry: schema.RegistryConfig


@section
class LaunchStage:
    """How `train` is launched; kept apart from `TrainStage`, since it does not shape the result."""

    launch: schema.LaunchConfig = schema.LaunchConfig()


Stage: TypeAlias = (
    PretrainStage
    | PretrainRewardStage
    | PromptsStage
    | TrainStage
    | EvaluateStage
    | RegisterStage
    | PromoteStage
    | RegistryStage
    | LaunchStage
)
STAGES: tuple[type[Stage], ...] = get_args(Stage)
StageType = TypeVar("StageType", bound=Stage)


def load_config(stage: type[StageType], path: Path) -> StageType:
    """Load the parameters of a stage from a parameter file and the files that it extends.

    The sections of other stages are not checked, but a section that no stage has is an error.

    Raises:
        ConfigError: one line for each problem, starting with the file and the dotted path of the parameter.
    """
    values = read_parameters(path)
    known = list(dict.fromkeys(field.name for each in STAGES for field in dataclasses.fields(each)))
    if unknown := [str(key) for key in values if key not in known]:
        raise ConfigError("\n".join(f"{path}: {key}: {unknown_key(key, known)}" for key in unknown))
    names = [field.name for field in dataclasses.fields(stage)]
    return validated(stage, {name: values[name] for name in names if name in values}, str(path))


def to_flat_dict(config: Stage) -> dict[str, Any]:
    """Return a configuration as dotted keys and JSON values: `{"sampling.num_steps": 10, ...}`."""
    return flatten(dataclasses.asdict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def config_digest(config: Stage) -> str:
    """Return the SHA-256 of every value of a configuration as 64 hex digits."""
    canonical = json.dumps(to_flat_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sampling_conflicts(config: TrainStage) -> Iterator[str]:
    """Yield what would leave a trained step without a density, or make no sense."""
    sampling, last = config.sampling, config.sampling.num_steps - 1
    if sampling.sampler == "ode":
        yield "sampling.sampler: 'ode' is deterministic: no step has a density to train; use flow_sde, ddim_sde or cps"
    if sampling.noise_level == 0:
        yield "sampling.noise_level: 0 is deterministic: no step has a density to train; use 0.7, for example"
    if sampling.sampler in ("ddim_sde", "cps") and sampling.noise_level > 1:
        yield (
            f"sampling.noise_level: {sampling.noise_level} asks sampler {sampling.sampler} for more noise than a state "
            "holds; use a value in 0..1, or sampler flow_sde"
        )
    steps = config.trained_steps
    if list(steps) != sorted(set(steps)) or steps[-1] >= last:
        yield (
            f"update.trained_steps: {list(steps)} is not an ascending list of steps in 0..sampling.num_steps - 2 = "
            f"0..{last - 1}; the last step, {last}, has no density under every sampler and is never trained"
        )
    states = config.estimates.states
    if states is not None and (
        list(states) != sorted(set(states)) or (states[0], states[-1]) != (0, sampling.num_steps)
    ):
        yield (
            f"estimates.states: {list(states)} is not an ascending list from 0 to sampling.num_steps = "
            f"{sampling.num_steps}; the first is the shared start state, the last the image, use null for all"
        )
    if config.advantage.std == "global" and config.advantage.credit != "terminal":
        yield (
            f"advantage.std: 'global' is a choice of Flow-GRPO only, and advantage.credit is "
            f"{config.advantage.credit!r}; use std group, or credit terminal"
        )


def batch_conflicts(config: TrainStage, num_processes: int = 1) -> Iterator[str]:
    """Yield every batch size that does not divide, with its equation and the nearest values that do."""
    rollout, update = config.rollout, config.update
    if rollout.prompts_per_update % update.steps_per_update:
        total = rollout.prompts_per_update
        yield _indivisible("update.steps_per_update", update.steps_per_update, "rollout.prompts_per_update", total)
        return
    share = rollout.num_images // update.steps_per_update // num_processes
    names, numbers = (" / processes", f" / {num_processes}") if num_processes > 1 else ("", "")
    quotient = (
        f"rollout.prompts_per_update * rollout.group_size / update.steps_per_update{names} = "
        f"{rollout.prompts_per_update} * {rollout.group_size} / {update.steps_per_update}{numbers}"
    )
    for path, micro_batch in (("rollout", rollout.micro_batch_size), ("update", update.micro_batch_size)):
        if micro_batch < share and share % micro_batch:
            yield _indivisible(f"{path}.micro_batch_size", micro_batch, quotient, share)


def _schedule_conflicts(config: TrainStage) -> Iterator[str]:
    """Yield an evaluation interval that would evaluate an adapter without a checkpoint."""
    evaluate, save = config.evaluation.every_num_updates, config.checkpoint.every_num_updates
    if evaluate % save:
        yield (
            f"evaluation.every_num_updates: {evaluate} is not a multiple of checkpoint.every_num_updates = {save}, so "
            f"an evaluated adapter would have no checkpoint; use {save * max(1, round(evaluate / save))}"
        )


def _serving_conflicts(config: RegisterStage) -> Iterator[str]:
    """Yield a limit that would refuse what the version draws by itself."""
    evaluation, serving = config.evaluation, config.serving
    for name, value, limit in (
        ("max_steps", evaluation.num_steps, serving.max_steps),
        ("max_guidance_scale", evaluation.guidance_scale, serving.max_guidance_scale),
    ):
        if value > limit:
            yield f"serving.{name}: {limit} is less than the {value} that the version is evaluated with; use {value}"


def _promotion_conflicts(config: PromoteStage) -> Iterator[str]:
    """Yield what would make the comparison of candidate and champion unfair or impossible."""
    promotion, evaluation = config.promotion, config.evaluation
    if promotion.seed == evaluation.seed:
        yield (
            f"promotion.seed: {promotion.seed} is evaluation.seed, on whose noise the candidate was selected and looks "
            f"better than it is; use another, for example {promotion.seed + 1}"
        )
    if promotion.held_out.name == config.reward.name:
        yield (
            f"promotion.held_out: {promotion.held_out.name} is the reward that is trained on, reward.name; use one "
            "that training does not see"
        )
    if evaluation.images_per_prompt < 2:
        yield (
            f"evaluation.images_per_prompt: {evaluation.images_per_prompt} image of a prompt shows no diversity; use 2 "
            "or more"
        )
    needed = math.ceil(len(TAGS) / promotion.error_rate)
    if promotion.num_resamples < needed:
        yield (
            f"promotion.num_resamples: {promotion.num_resamples} leave no resample beyond the bound of a task, which "
            f"has a {len(TAGS)}th of promotion.error_rate = {promotion.error_rate:g}; use {needed} or more"
        )


def _indivisible(path: str, value: int, equation: str, total: int) -> str:
    small = [divisor for divisor in range(1, math.isqrt(total) + 1) if total % divisor == 0]
    divisors = sorted({*small, *(total // divisor for divisor in small)})
    below = max(divisor for divisor in divisors if divisor <= value)
    nearest = {below, *(divisor for divisor in divisors if divisor > value and divisor <= 2 * value)}
    return f"{path}: {value} does not divide {equation} = {total}; use {' or '.join(map(str, sorted(nearest)[:2]))}"
