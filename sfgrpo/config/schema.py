"""Sections of `params.yaml`: every parameter with its type, unit and range."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

import pydantic
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat

from sfgrpo.config.ranges import (
    Count,
    CountOrZero,
    Edition,
    Fraction,
    Guidance,
    GuidanceScale,
    ImageCount,
    ModelName,
    Name,
    NewAlias,
    ProcessCount,
    PromptCount,
    PromptCountOrZero,
    ResampleCount,
    Seed,
    StepCount,
    StepIndex,
    TokenCount,
    UnitInterval,
    Width,
)
from sfgrpo.types import TAGS, Credit, KlForm, LrScheduler, SamplerName, StdScope, Tag

Section = TypeVar("Section")


def _every_task(numbers: dict[Tag, Any]) -> dict[Tag, Any]:
    """Refuse numbers per task that leave a task out, or that are all zero."""
    if absent := [tag for tag in TAGS if tag not in numbers]:
        raise ValueError(f"{', '.join(absent)} missing; give every task a number, 0 to leave it out")
    if not sum(numbers.values()):
        raise ValueError("every task has 0; give at least one of them more")
    return numbers


TaskWeights = Annotated[dict[Tag, NonNegativeFloat], AfterValidator(_every_task)]
TaskCounts = Annotated[dict[Tag, PromptCountOrZero], AfterValidator(_every_task)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[Section]) -> type[Section]:
    """Make a class a frozen, slotted, keyword-only dataclass that checks its values and coerces nothing."""
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    decorate = pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=rules)
    return cast("type[Section]", decorate(cls))


@section
class PromptsConfig:
    """Which prompts are trained on, which select the best adapter, and which are kept for the table."""

    source: Literal["shapes", "geneval"]
    """World that the prompts describe."""
    num_train: PromptCount
    """Training prompts."""
    task_weights: TaskWeights
    """Relative frequency of each GenEval task among the training prompts."""
    num_validation: TaskCounts
    """Validation prompts of each task, which select the best adapter; none of them is trained or evaluated on."""
    num_evaluation: TaskCounts
    """Evaluation prompts of each task, for table and promotion; none of them is trained on or selects an adapter."""
    edition: Edition = 0
    """Number of the random draw of training prompts; the other prompts are the same in every edition."""


@section
class PolicyConfig:
    """The pretrained flow-matching pipeline and the adapter that is trained on it."""

    pretrained: Name
    """Folder or hub name of a diffusers pipeline."""
    revision: Name | None = None
    """Hub commit; null for a folder."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the frozen weights; adapter, latents and scheduler maths are always float32.

    Under `float16`, whose range is small, the loss is scaled before the backward pass.
    """
    resolution: Width
    """Height and width of an image in pixels."""
    max_sequence_length: TokenCount
    """Tokens of the T5 encoder; 0 leaves the encoder out, and the pipeline takes no more than 512."""
    lora_rank: Width
    """Rank r of the adapter."""
    lora_alpha: Count
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_rank."""
    lora_targets: Annotated[tuple[Name, ...], MinLen(1)]
    """Suffixes of the names of the layers that are adapted."""


@section
class SamplingConfig:
    """How the policy samples while it is trained."""

    sampler: SamplerName
    """Rule of one step; `ode` is deterministic."""
    num_steps: Annotated[StepCount, Ge(2)]
    """Denoising steps K of a rollout."""
    noise_level: NonNegativeFloat
    """Noise eta of a stochastic step; 0 makes every sampler the ODE."""
    guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance weight; 1 disables it."""


@section
class RolloutConfig:
    """How many images are sampled between two updates of the policy."""

    prompts_per_update: ImageCount
    """Prompts P of one rollout."""
    group_size: Annotated[ImageCount, Ge(2)]
    """Images G of each prompt, which share their start noise and are compared with each other."""
    micro_batch_size: ImageCount
    """Images that are denoised together."""

    @property
    def num_images(self) -> int:
        """Images N = P * G of one rollout."""
        return self.prompts_per_update * self.group_size


@section
class EstimatesConfig:
    """How the clean image is estimated from an intermediate state; without effect under terminal credit."""

    num_substeps: StepCount
    """Euler substeps T' from a state to its clean estimate, capped by the remaining steps; 1 is Tweedie's formula."""
    states: Annotated[tuple[StepIndex, ...], MinLen(2)] | None = None
    """States that are scored, ascending from 0 to K; steps between two of them share a gain; null is every state."""


@section
class RewardConfig:
    """The reward that training maximises."""

    name: Name
    """Name in the table of rewards."""
    pretrained: Name | None = None
    """Folder or hub name of the model behind the reward; null for rewards that have none."""
    revision: Name | None = None
    """Hub commit; null for a folder."""


@section
class AdvantageConfig:
    """How rewards become advantages of steps."""

    credit: Credit
    """`joint`, `per_step`, `step_mean`: gains, by their normalisation; `terminal`: the final reward (Flow-GRPO)."""
    std: StdScope
    """Whether the standard deviation is that of the group or of the whole rollout."""
    clip: PositiveFloat
    """Largest absolute advantage."""
    gae_lambda: UnitInterval = 0.0
    """Weight of later gains in that of a step; 0 is the paper's method, 1 the final reward minus the state's."""


@section
class UpdateConfig:
    """How a rollout changes the policy."""

    num_updates: Count
    """Updates of a run; each is one rollout and its optimiser steps."""
    steps_per_update: Count
    """Optimiser steps per rollout; each takes its own share of the prompts."""
    learning_rate: PositiveFloat
    """Learning rate of AdamW at the first update."""
    lr_scheduler: LrScheduler = "constant"
    """Course of the learning rate: constant, or linear, which falls to 0 after the last update."""
    betas: tuple[Fraction, Fraction]
    """Decay of AdamW's first and second moment."""
    weight_decay: NonNegativeFloat
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat
    """L2 norm to which the gradient is clipped."""
    clip_range: Annotated[float, Gt(0), Lt(1)]
    """Largest |ratio - 1| that is not clipped; small, since the log-prob is a mean over latent elements."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the initial policy; 0 saves the reference pass."""
    kl_form: KlForm
    """Variance in the KL: that of the step, or Flow-GRPO's, which leaves out dt."""
    trained_steps: Annotated[tuple[StepIndex, ...], MinLen(1)] | None = None
    """Denoising steps in the objective, ascending; null is all but the last, which is never trained."""
    micro_batch_size: ImageCount
    """Images per forward and backward pass."""
    ratio_tolerance: PositiveFloat
    """Largest |ratio - 1| before the first optimiser step of an update; more stops the run."""
    max_broken_updates: CountOrZero
    """Updates of a run in which a reward, loss or gradient may be NaN or infinite; one more stops the run."""


@section
class EmaConfig:
    """Moving average of the adapter, which is what is evaluated and published."""

    decay: Fraction
    """Weight of the old average per update, after warm-up; 0 follows the adapter."""


@section
class CheckpointConfig:
    """When the state of a run is saved."""

    every_num_updates: Count
    """Updates between two checkpoints."""
    keep: Count
    """Number of newest checkpoints that are kept."""


@section
class EvaluationConfig:
    """How a policy is evaluated: fixed prompts and noise, deterministic sampler."""

    num_steps: StepCount
    """Denoising steps of the ODE."""
    guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance weight; 1 disables it."""
    images_per_prompt: ImageCount
    """Images of each prompt."""
    seed: Seed
    """Seed of the start noise; the same for every policy that is compared."""
    micro_batch_size: ImageCount
    """Images that are denoised together."""
    every_num_updates: Count
    """Updates between two evaluations of a training run."""
    training_sampler: bool = False
    """Whether a training also measures the mean rewards of the stochastic sampler that it trains with."""


@section
class RegistryConfig:
    """Where a trained policy is registered."""

    model_name: ModelName
    """Registered model in MLflow."""
    alias: NewAlias
    """Alias that the new version gets; `champion` and `previous` belong to promotion."""


@section
class ServingConfig:
    """What one request to a registered version may ask for; recorded in the version, which refuses more."""

    max_prompts: ImageCount
    """Prompts, whose images are drawn together."""
    max_steps: StepCount
    """Denoising steps."""
    max_guidance_scale: Guidance
    """Classifier-free guidance weight."""


@section
class PromotionConfig:
    """When a candidate replaces the champion; both are sampled as in `evaluation`, but from other noise."""

    held_out: RewardConfig
    """Reward that training does not see, and that must not fall."""
    seed: Seed
    """Seed of noise and bootstrap; not `evaluation.seed`, on whose noise the candidate was selected."""
    min_gain: UnitInterval
    """Gain in the overall score that is required beyond its standard error; 0 requires any gain."""
    min_diversity_ratio: UnitInterval
    """Required share of the champion's diversity, beyond its standard error."""
    min_agreement: UnitInterval
    """Share of the correct counts that an independent counter must confirm; less is refused where it is shown."""
    agreement_images: ImageCount
    """Images of each prompt that asks for a number by which the agreement is measured."""
    error_rate: Annotated[float, Gt(0), Lt(0.5)]
    """Probability that a candidate no better than the champion passes."""
    num_resamples: ResampleCount
    """Resamples of the bootstrap."""


@section
class LaunchConfig:
    """How many processes share a training; apart from rounding, no result depends on it."""

    num_processes: ProcessCount = 1
    """Processes of each node, one per GPU; the default is one process that starts no others."""
    num_nodes: ProcessCount = 1
    """Nodes, on each of which `python -m sfgrpo train` is started."""
    max_restarts: CountOrZero = 0
    """Restarts of all processes, from the last checkpoint, after one of them failed."""
    sharding: Literal["none", "full"] = "none"
    """Whether every process holds all frozen weights, or each a part (FSDP2)."""

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.num_processes * self.num_nodes
