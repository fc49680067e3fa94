"""The untrained shapes pipeline: diffusers' own StableDiffusion3Pipeline over a vocabulary of a few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sfgrpo.shapes.prompt_sets import all_prompts

MAX_TEXT_TOKENS = 12
"""Start, ten words, end: the longest prompt of the world."""
TEXT_WIDTH = 64
LATENT_SIZE = 8


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Apply byte-pair merges, the earliest first."""
    for left, right in merges:
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == (left, right):
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def build_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer in which every word of the prompts is one token; others are split into letters."""
    prompts = (prompt for prompts in all_prompts().values() for prompt in prompts)
    words = sorted({word for prompt in prompts for word in prompt.text.split()})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789,.'-"))
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TEXT_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Tokenise texts to ids [N, L], padded to the longest prompt."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def text_config(tokenizer: CLIPTokenizer, **options: Any) -> CLIPTextConfig:
    """Return the configuration of a text transformer of two layers for the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _build_silent_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Return a T5 of 1,568 weights whose last scale is zero, so that every token is encoded as zeros.

    These are the zeros that the pipeline uses in place of an absent T5. The stand-in exists because diffusers loads a
    StableDiffusion3Pipeline without T5 only if the caller passes `text_encoder_3=None, tokenizer_3=None`.
    """
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=1, d_ff=1, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_pipeline(
    autoencoder: AutoencoderKL, *, num_layers: int, num_attention_heads: int, attention_head_dim: int, shift: float
) -> StableDiffusion3Pipeline:
    """Assemble the pipeline around a trained autoencoder; transformer and text encoders are untrained.

    Weights are drawn from torch's global generator: seed it first. The T5 encoder is a stand-in that returns zeros.
    """
    tokenizer = build_tokenizer()
    channels = autoencoder.config.latent_channels
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=num_attention_heads * attention_head_dim,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    encoder_config = text_config(tokenizer, projection_dim=TEXT_WIDTH)
    text_encoder, text_encoder_2 = (CLIPTextModelWithProjection(encoder_config) for _ in range(2))
    text_encoder_3, tokenizer_3 = _build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
