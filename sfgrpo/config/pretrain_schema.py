"""Sections of `params.yaml` that configure the pretraining of the shapes models."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen
from pydantic import NonNegativeFloat, PositiveFloat

from sfgrpo.config.ranges import Count, Fraction, GuidanceScale, ImageCount, StepCount, UnitInterval, Width
from sfgrpo.config.schema import TaskWeights, section


@section
class AutoencoderConfig:
    """Training of the base model's autoencoder."""

    num_images: Count
    """Rendered pictures; a set of their own."""
    latent_channels: Width
    """Channels of a latent."""
    num_steps: Count
    """Optimiser steps."""
    batch_size: ImageCount
    """Images per step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW."""
    kl_weight: NonNegativeFloat
    """Weight of the KL of a latent element to N(0, 1) beside the L1 error."""


@section
class TransformerConfig:
    """Shape and training of the base model's transformer and text encoders."""

    num_layers: Width
    """Transformer blocks."""
    num_attention_heads: Width
    """Heads per block."""
    attention_head_dim: Width
    """Channels per head."""
    num_steps: Count
    """Optimiser steps."""
    batch_size: ImageCount
    """Images per step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW, for all parameters except the weight matrices of the blocks."""
    muon_learning_rate: PositiveFloat
    """Peak learning rate of Muon, for the matrices of attention and feed-forward; RMS-matched to AdamW."""
    ema_decay: Fraction
    """Weight of the old average per step; the average is what gets saved."""
    caption_dropout: UnitInterval
    """Share of the captions replaced by the empty one, for classifier-free guidance."""
    decay_fraction: UnitInterval
    """Share of the steps, at the end, over which the learning rates fall linearly to 0; 0 keeps them constant."""
    warmup_steps: Count
    """Steps over which the learning rates rise."""
    padded_every_num_steps: Count
    """Interval of steps whose text has the zero tokens that the pipeline appends by default in place of T5's."""
    shift: PositiveFloat
    """Shift of the scheduler's noise levels towards noise."""
    bfloat16: bool
    """Whether the training runs under bfloat16 autocast; weights and optimiser are float32."""
    compile: bool
    """Whether torch.compile builds the transformer for training; needs a C++ compiler."""


@section
class PretrainEvaluationConfig:
    """How the base model is evaluated after its training."""

    prompts_per_task: ImageCount
    """Prompts of each task, or all of them where there are fewer."""
    images_per_prompt: ImageCount
    """Images of each prompt."""
    num_steps: StepCount
    """Denoising steps of the ODE."""
    guidance_scales: Annotated[tuple[GuidanceScale, ...], MinLen(1)]
    """Classifier-free guidance weights; one table row each."""


@section
class PretrainConfig:
    """Training of the base model on rendered pictures of shapes."""

    num_images: Count
    """Rendered pictures that the transformer is trained on."""
    task_weights: TaskWeights
    """Relative frequency of each GenEval task among the pictures."""
    autoencoder: AutoencoderConfig
    """The first half of the training."""
    transformer: TransformerConfig
    """The second half of the training."""
    evaluation: PretrainEvaluationConfig
    """Evaluation after the training."""


@section
class PretrainRewardConfig:
    """Training of the shapes world's CLIP, the model behind the reward `clip`."""

    num_images: Count
    """Rendered pictures."""
    task_weights: TaskWeights
    """Relative frequency of each GenEval task among the pictures and the batches."""
    patch_size: Width
    """Height and width of a patch in pixels."""
    width: Width
    """Channels of the vision transformer, a multiple of 16."""
    num_layers: Width
    """Layers of the vision transformer."""
    num_steps: Count
    """Optimiser steps."""
    batch_size: ImageCount
    """Captioned pictures per step; pictures of other tasks come on top."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW, for all parameters except the weight matrices of the layers."""
    muon_learning_rate: PositiveFloat
    """Peak learning rate of Muon, for the matrices of attention and feed-forward; RMS-matched to AdamW."""
    simple_fraction: UnitInterval
    """Share of the steps, at the start, that show one object only."""
