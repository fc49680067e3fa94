"""Published architectures with random weights: they cost what the real models cost, and need no download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENIZERS = Path("models/shapes-base")
"""Any tokenizer will do: the words matter to no timing."""
CLIP_TOKENS = 77

SD35_MEDIUM: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
"""Transformer of stabilityai/stable-diffusion-3.5-medium, by its config.json."""
SD3_AUTOENCODER: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Autoencoder of the same model."""


def build_sd35_medium(device: torch.device, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Build SD3.5-Medium with random weights on a device.

    Transformer and autoencoder have the published shapes. The text encoders are two layers (CLIP) and one layer (T5)
    deep but of the published widths, so that the conditioning has its real shape: 77 + T5 tokens of 4096, pooled 2048.
    """
    return build_sd3(device, dtype, SD35_MEDIUM, SD3_AUTOENCODER, clip_widths=(768, 1280))


def build_sd3(
    device: torch.device,
    dtype: torch.dtype,
    transformer: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    clip_widths: tuple[int, int],
) -> StableDiffusion3Pipeline:
    """Build a pipeline of the SD3 family from the configurations of its parts."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            tokenizers = [_load_tokenizer(name) for name in ("tokenizer", "tokenizer_2")]
            t5_tokenizer = T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_3")
            parts = {
                "transformer": SD3Transformer2DModel(**transformer),
                "vae": AutoencoderKL(**autoencoder),
                "text_encoder": _build_clip(clip_widths[0], tokenizers[0]),
                "text_encoder_2": _build_clip(clip_widths[1], tokenizers[1]),
                "text_encoder_3": _build_t5(transformer["joint_attention_dim"], t5_tokenizer),
            }
    finally:
        torch.set_default_dtype(previous)
    return StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / name)
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _build_clip(width: int, tokenizer: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=CLIP_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _build_t5(width: int, tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=64, d_ff=2 * width, num_layers=1, num_heads=width // 64)
    )
