"""The shapes autoencoder: a small diffusers AutoencoderKL and its training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.config.pretrain_schema import AutoencoderConfig
from sfgrpo.policies.sd3 import to_images
from sfgrpo.shapes.detector import detect
from sfgrpo.shapes.world import IMAGE_SIZE
from sfgrpo.types import Detection

OBJECT_WEIGHT = 4.0
"""Extra weight of the reconstruction error on pixels that differ from the ground."""


def build_autoencoder(latent_channels: int) -> AutoencoderKL:
    """Return the untrained autoencoder of 32x32 pixels and 8x8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).to(memory_format=torch.channels_last)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 images [N, H, W, 3] to the pipeline's pixels [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def reconstruction_loss(autoencoder: AutoencoderKL, pixels: Tensor, kl_weight: float) -> Tensor:
    """Return the L1 error, weighted towards objects, plus `kl_weight` times the KL of a latent element to N(0, 1)."""
    posterior = autoencoder.encode(pixels).latent_dist
    decoded = autoencoder.decode(posterior.sample()).sample
    ground = pixels[:, :, :1, :1]
    weight = 1.0 + OBJECT_WEIGHT * ((pixels - ground).abs().amax(dim=1, keepdim=True) > 0.1)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return (weight * (decoded - pixels).abs()).mean() + kl_weight * kl


def train_autoencoder(
    autoencoder: AutoencoderKL, images: NDArray[np.uint8], config: AutoencoderConfig, seed: int
) -> Iterator[tuple[int, float]]:
    """Train in place with AdamW and a cosine schedule; yield (step, loss) after every step."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rate, num_steps = config.learning_rate, config.num_steps
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=num_steps, pct_start=0.03, cycle_momentum=False
    )
    for step in range(num_steps):
        pixels = to_pixels(images[generator.integers(len(images), size=config.batch_size)])
        loss = reconstruction_loss(autoencoder, pixels.contiguous(memory_format=torch.channels_last), config.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.item()


@torch.no_grad()
def standardise_latents(autoencoder: AutoencoderKL, images: NDArray[np.uint8]) -> None:
    """Set the scaling and shift factors so that the latents of `images` have mean 0 and standard deviation 1."""
    mean = autoencoder.encode(to_pixels(images)).latent_dist.mean
    autoencoder.register_to_config(shift_factor=mean.mean().item(), scaling_factor=1.0 / mean.std().item())


@torch.no_grad()
def encode_images(autoencoder: AutoencoderKL, images: NDArray[np.uint8], batch_size: int = 256) -> Tensor:
    """Encode images [N, H, W, 3] to the transformer's latents [N, C, 8, 8] (posterior means, standardised)."""
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return torch.cat([(autoencoder.encode(to_pixels(batch)).latent_dist.mean - shift) * scale for batch in batches])


def _same(first: Detection, second: Detection) -> bool:
    left, top = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    right, bottom = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    overlap = max(right - left, 0.0) * max(bottom - top, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first.box, second.box)) - overlap
    return (first.class_name, first.color) == (second.class_name, second.color) and overlap > 0.5 * union


@torch.no_grad()
def detection_survival(autoencoder: AutoencoderKL, images: NDArray[np.uint8], threshold: float = 0.3) -> float:
    """Return the share of detections that are found again (class, colour, place) after encode and decode."""
    decoded = to_images(autoencoder.decode(autoencoder.encode(to_pixels(images)).latent_dist.mean).sample)
    survived = total = 0
    for image, copy in zip(images, decoded, strict=True):
        found = [detection for detection in detect(image) if detection.score > threshold]
        again = [detection for detection in detect(copy) if detection.score > threshold]
        total += len(found)
        survived += sum(any(_same(detection, other) for other in again) for detection in found)
    return survived / total
