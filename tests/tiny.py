"""Builds the smallest real pipeline and adapter: random weights, a second to make, a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict

from sfgrpo.shapes.pipeline import build_pipeline

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def build_tiny_pipeline(path: Path) -> StableDiffusion3Pipeline:
    """Saves a pipeline of 32-pixel images in diffusers' format and returns it; the same weights every time."""
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
    pipeline.save_pretrained(path)
    return pipeline


def build_tiny_adapter(pipeline: StableDiffusion3Pipeline, path: Path, seed: int = 0) -> Path:
    """Saves a random LoRA adapter for the transformer in diffusers' format; returns the folder."""
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
