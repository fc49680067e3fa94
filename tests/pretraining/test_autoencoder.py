"""The autoencoder: pixels and back, standardised latents, a training that learns, and what of a picture survives."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from sfgrpo.config.pretrain_schema import AutoencoderConfig
from sfgrpo.pretraining.autoencoder import (
    OBJECT_WEIGHT,
    build_autoencoder,
    detection_survival,
    encode_images,
    reconstruction_loss,
    standardise_latents,
    to_images,
    to_pixels,
    train_autoencoder,
)
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.types import TAGS
from tests.support.tiny import make_tiny_pipeline, make_tiny_policy

PICTURES = render_pictures(24, dict.fromkeys(TAGS, 1.0), seed=0).images


def trained(num_steps: int) -> tuple[torch.nn.Module, list[float]]:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(latent_channels=4)
    config = AutoencoderConfig(
        num_images=24, latent_channels=4, num_steps=num_steps, batch_size=8, learning_rate=3e-3, kl_weight=1e-3
    )
    return autoencoder, [loss for _, loss in train_autoencoder(autoencoder, PICTURES, config, seed=1)]


def test_pixels_come_back_bit_for_bit():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(levels)
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert np.array_equal(to_images(pixels), levels)


def test_pixels_beyond_the_range_are_clamped():
    assert to_images(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_training_lowers_the_loss():
    _, losses = trained(40)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


def test_training_is_the_same_every_time():
    (first, losses), (second, again) = trained(3), trained(3)
    assert losses == again
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_standardised_latents_have_mean_zero_and_deviation_one():
    torch.manual_seed(0)
    autoencoder = build_autoencoder(latent_channels=4)
    standardise_latents(autoencoder, PICTURES)
    latents = encode_images(autoencoder, PICTURES)
    assert latents.shape == (24, 4, 8, 8) and not latents.requires_grad
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(encode_images(autoencoder, PICTURES, batch_size=5), latents, rtol=1e-4, atol=1e-4)


def test_policy_decodes_what_was_encoded():
    autoencoder, _ = trained(2)
    standardise_latents(autoencoder, PICTURES)
    pipeline = make_tiny_pipeline()
    pipeline.register_modules(vae=autoencoder)
    with torch.no_grad():
        expected = to_images(autoencoder.decode(autoencoder.encode(to_pixels(PICTURES)).latent_dist.mean).sample)
    images = make_tiny_policy(pipeline).decode(encode_images(autoencoder, PICTURES))
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


class Copier:
    """An autoencoder that keeps every pixel, or none of them."""

    def __init__(self, offset: float = 0.0, keeps: float = 1.0) -> None:
        self.offset, self.keeps = offset, keeps

    def encode(self, pixels: torch.Tensor) -> types.SimpleNamespace:
        latent = types.SimpleNamespace(mean=pixels, var=torch.ones(()), logvar=torch.zeros(()), sample=lambda: pixels)
        return types.SimpleNamespace(latent_dist=latent)

    def decode(self, latents: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(sample=latents * self.keeps + self.offset)


def test_all_detections_survive_a_perfect_autoencoder_and_none_a_blind_one():
    assert detection_survival(Copier(), PICTURES) == 1.0
    assert detection_survival(Copier(keeps=0.0), PICTURES) == 0.0


def test_error_counts_more_on_objects():
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[:, :, 2, 2] = 0.5
    loss = reconstruction_loss(Copier(offset=0.1), pixels, kl_weight=0.0)
    assert loss.item() == pytest.approx(0.1 * (16 + OBJECT_WEIGHT) / 16)


def test_kl_is_that_of_the_posterior_to_the_standard_normal():
    pixels = torch.full((1, 3, 4, 4), 0.5)
    assert reconstruction_loss(Copier(), pixels, kl_weight=2.0).item() == pytest.approx(2.0 * 0.5 * 0.25)
