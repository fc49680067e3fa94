"""The smallest real pipeline, policy and adapter: random weights, a second to make, a few hundred kilobytes."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from sfgrpo.policies.base import Policy
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.pretraining.pipeline import build_pipeline
from sfgrpo.registry.register import ServingDefaults
from sfgrpo.rewards.base import Reward
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.types import Prompt

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def make_tiny_pipeline(*, blobs: bool = False) -> StableDiffusion3Pipeline:
    """Make a pipeline of 32-pixel images; the same weights every time.

    With `blobs` it draws light blobs on black, in which the detector sees shapes, so that GenEval's rewards differ.
    """
    pipeline = StableDiffusion3Pipeline(**copy.deepcopy(_tiny_components()))
    if blobs:
        last = pipeline.vae.decoder.conv_out
        last.weight.data.mul_(20.0)
        last.bias.data.fill_(-10.0)
    return pipeline


@functools.cache
def _tiny_components() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        pipeline = build_pipeline(autoencoder, num_layers=2, num_attention_heads=2, attention_head_dim=8, shift=1.0)
        # An untrained transformer ends in zeros, which would hide every change inside it.
        torch.nn.init.normal_(pipeline.transformer.proj_out.weight)
    return pipeline.components


def build_tiny_pipeline(path: Path, *, blobs: bool = False) -> StableDiffusion3Pipeline:
    """Save the pipeline in diffusers' format and return it."""
    pipeline = make_tiny_pipeline(blobs=blobs)
    pipeline.save_pretrained(path)
    return pipeline


def build_tiny_adapter(pipeline: StableDiffusion3Pipeline, path: Path, seed: int = 0) -> Path:
    """Save a random LoRA adapter for the transformer in diffusers' format; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=list(LORA_TARGETS), init_lora_weights=False)
        pipeline.transformer.add_adapter(config, adapter_name="tiny")
    # Without the metadata whoever loads the adapter takes alpha for the rank; a set has no order to save it in.
    metadata = pipeline.transformer.peft_config["tiny"].to_dict() | {"target_modules": sorted(LORA_TARGETS)}
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="tiny")
    StableDiffusion3Pipeline.save_lora_weights(
        path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    pipeline.transformer.delete_adapters("tiny")
    return path


def tiny_serving(pipeline: Path, num_inference_steps: int = 2) -> ServingDefaults:
    """Return how a registered version with a tiny pipeline draws."""
    return ServingDefaults(
        pretrained=str(pipeline),
        revision=None,
        dtype="float32",
        resolution=32,
        max_sequence_length=0,
        num_inference_steps=num_inference_steps,
        guidance_scale=1.0,
        max_prompts=4,
        max_steps=10,
        max_guidance_scale=10.0,
    )


def make_tiny_policy(pipeline: StableDiffusion3Pipeline | None = None, **changes: Any) -> SD3Policy:
    """Make the policy of a pipeline, by default of a fresh one, with a small adapter that does nothing yet."""
    options: dict[str, Any] = {
        "resolution": 32,
        "max_sequence_length": 0,
        "lora_rank": 2,
        "lora_alpha": 4,
        "lora_targets": LORA_TARGETS,
    }
    return SD3Policy(pipeline or make_tiny_pipeline(), **options | changes)


def disturb(policy: Policy, seed: int = 0) -> None:
    """Move every adapter weight by random numbers, as training would, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def tiny_prompts(count: int) -> list[Prompt]:
    """Return prompts whose objects the blobs are sometimes taken for."""
    spaces = all_prompts()
    wanted = [prompt for tag in ("counting", "two_object", "colors") for prompt in spaces[tag]]
    return [prompt for prompt in wanted if {clause.class_name for clause in prompt.include} <= {"square", "triangle"}][
        :count
    ]


@contextlib.contextmanager
def counted_passes(policy: Policy) -> Iterator[list[int]]:
    """Record the batch size of every call of the transformer."""
    sizes: list[int] = []
    hook = policy.module.register_forward_hook(lambda module, arguments, output: sizes.append(len(output[0])))
    try:
        yield sizes
    finally:
        hook.remove()


class Light(Reward):
    """How light an image is, in 0..1: a reward that always differs, and that an adapter can learn."""

    name = "light"

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        return torch.from_numpy(images.mean(axis=(1, 2, 3), dtype=np.float64) / 255.0).float()
