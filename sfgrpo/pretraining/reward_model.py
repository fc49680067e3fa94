"""The model behind the reward `clip` in the shapes world: training, evaluation, model card."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sfgrpo.config.pretrain_schema import PretrainRewardConfig
from sfgrpo.pretraining.clip import STRANGERS, build_clip, retrieval_accuracy, train_clip
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.pretraining.optimization import run_and_log
from sfgrpo.pretraining.pipeline import build_tokenizer
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.shapes.world import IMAGE_SIZE
from sfgrpo.types import TAGS, Tag

logger = logging.getLogger(__name__)

REWARD_MODEL = Path("models/shapes-clip")
NUM_FRESH_IMAGES = 1200
NUM_CHOICES = 16
LOG_EVERY_NUM_STEPS = 250


def pretrain_reward_model(config: PretrainRewardConfig, seed: int, folder: Path = REWARD_MODEL) -> None:
    """Train the CLIP in one go and write it to `folder`: model, tokenizer, preprocessing, card and manifest."""
    # Different pictures for training and evaluation: seeds seed and seed + 1.
    pictures = render_pictures(config.num_images, config.task_weights, seed)
    fresh = render_pictures(NUM_FRESH_IMAGES, dict.fromkeys(TAGS, 1.0), seed + 1)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_clip(tokenizer, width=config.width, num_layers=config.num_layers, patch_size=config.patch_size)
    started = time.process_time()
    run_and_log("clip", train_clip(model, tokenizer, pictures, config, seed), config.num_steps, LOG_EVERY_NUM_STEPS)
    seconds = time.process_time() - started
    accuracy = retrieval_accuracy(model, tokenizer, fresh, num_choices=NUM_CHOICES)
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Images of 0..1 become pixels of -1..1.
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(partial)
        (partial / "README.md").write_text(_card(config, seed, accuracy, seconds), encoding="utf-8")
        write_manifest(partial)
    logger.info("reward model in %s, retrieval accuracy %s", folder, accuracy)


def _card(config: PretrainRewardConfig, seed: int, accuracy: Mapping[Tag, float], seconds: float) -> str:
    header = "| " + " | ".join(accuracy) + " |"
    row = "| " + " | ".join(f"{value:.2f}" for value in accuracy.values()) + " |"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# Shapes CLIP

A CLIP of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, trained from scratch on rendered pictures of coloured shapes and their
captions. It is the model behind the reward `clip` of the embedded pipeline, in the place that PickScore has at full
scale: it knows pictures and captions, and neither a detector nor GenEval's rules. Its logit scale is fixed, so that
the reward is the cosine of picture and caption.

```python
from transformers import CLIPModel, CLIPTokenizer

model = CLIPModel.from_pretrained("models/shapes-clip")
tokenizer = CLIPTokenizer.from_pretrained("models/shapes-clip")
```

| | |
|---|---|
| Made by | `python -m sfgrpo pretrain_reward` with the section `pretrain_reward` of `params.yaml`, seed {seed} |
| Data | {config.num_images:,} rendered pictures of the six GenEval tasks, weights {dict(config.task_weights)} |
| Training | {config.num_steps:,} steps of {config.batch_size} pairs and {round(STRANGERS * config.batch_size)} other \
pictures, symmetric InfoNCE, Muon and AdamW |
| Time | {seconds / 60:.0f} min of one CPU core ({platform.machine()}), torch {torch.__version__} |

How often a fresh picture is closest to its own caption among {NUM_CHOICES} captions of its task (or all, of fewer):

{header}
|{" ---: |" * len(accuracy)}
{row}
"""
