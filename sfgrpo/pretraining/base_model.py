"""The shapes base model: pictures, training of autoencoder and flow model, evaluation, model card."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from sfgrpo.config.pretrain_schema import PretrainConfig, TransformerConfig
from sfgrpo.evaluation.evaluate import SamplingProtocol, evaluate_policy
from sfgrpo.geneval.table import GenEvalTable, markdown_table
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.pretraining.autoencoder import (
    build_autoencoder,
    detection_survival,
    encode_images,
    standardise_latents,
    train_autoencoder,
)
from sfgrpo.pretraining.dataset import Pictures, render_pictures
from sfgrpo.pretraining.flow import PADDING_TOKENS, FlowTraining, tokenize_captions
from sfgrpo.pretraining.optimization import run_and_log
from sfgrpo.pretraining.pipeline import build_pipeline
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import IMAGE_SIZE
from sfgrpo.types import Prompt

logger = logging.getLogger(__name__)

BASE_MODEL = Path("models/shapes-base")
NUM_SURVIVAL_IMAGES = 600
SAVE_EVERY_NUM_STEPS = 500
LOG_EVERY_NUM_STEPS = 100


def pretrain_base_model(config: PretrainConfig, seed: int, folder: Path) -> None:
    """Train the base model into `BASE_MODEL`; a second call resumes from what is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Three different sets of pictures: seeds seed, seed + 1 and seed + 2.
    fresh = render_pictures(NUM_SURVIVAL_IMAGES, config.task_weights, seed + 1).images
    pictures = render_pictures(config.num_images, config.task_weights, seed + 2)
    autoencoder = _trained_autoencoder(config, pictures, seed, folder)
    pipeline = _trained_pipeline(config.transformer, autoencoder, pictures, seed, folder)
    with atomic_directory(folder / "pipeline") as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
    tables = geneval_tables(folder / "pipeline", config)
    with atomic_directory(BASE_MODEL) as partial:
        shutil.copytree(folder / "pipeline", partial, dirs_exist_ok=True)
        survival = detection_survival(autoencoder, fresh)
        (partial / "README.md").write_text(_card(config, seed, survival, tables, folder), encoding="utf-8")
        write_manifest(partial)
    logger.info("base model in %s\n%s", BASE_MODEL, markdown_table(tables))


def _trained_autoencoder(config: PretrainConfig, pictures: Pictures, seed: int, folder: Path) -> AutoencoderKL:
    finished = folder / "autoencoder"
    if not finished.exists():
        section = config.autoencoder
        images = render_pictures(section.num_images, config.task_weights, seed).images
        torch.manual_seed(seed)
        autoencoder = build_autoencoder(section.latent_channels)
        steps = train_autoencoder(autoencoder, images, section, seed)
        with _clocked(folder, "autoencoder"):
            run_and_log("autoencoder", steps, section.num_steps, LOG_EVERY_NUM_STEPS)
        standardise_latents(autoencoder, pictures.images[:2000])
        with atomic_directory(finished) as partial:
            autoencoder.save_pretrained(partial)
    return AutoencoderKL.from_pretrained(finished, use_safetensors=True).eval()


def _trained_pipeline(
    config: TransformerConfig, autoencoder: AutoencoderKL, pictures: Pictures, seed: int, folder: Path
) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    pipeline = build_pipeline(
        autoencoder,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        shift=config.shift,
    )
    training = FlowTraining(pipeline, config)
    state = folder / "flow.safetensors"
    if state.exists():
        training.load(state)
    latents = encode_images(autoencoder, pictures.images)
    steps = training.run(latents, pictures.prompt_index, tokenize_captions(pipeline, pictures.prompts), seed)
    with _clocked(folder, "flow"):
        run_and_log("flow", _saving(training, steps, state), config.num_steps, LOG_EVERY_NUM_STEPS)
    training.use_averaged_weights()
    return pipeline


def _saving(training: FlowTraining, steps: Iterable[tuple[int, float]], state: Path) -> Iterator[tuple[int, float]]:
    for step, loss in steps:
        if step % SAVE_EVERY_NUM_STEPS == 0 or step == training.config.num_steps:
            training.save(state)
        yield step, loss


@contextlib.contextmanager
def _clocked(folder: Path, name: str) -> Iterator[None]:
    """Add the seconds of the block to those of earlier calls, for the model card."""
    path = folder / "seconds.json"
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = json.loads(path.read_text()) if path.exists() else {}
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
        path.write_text(json.dumps(seconds))


def geneval_tables(pretrained: Path, config: PretrainConfig) -> dict[str, GenEvalTable]:
    """Return the GenEval-shapes table of every guidance scale, on prompts spread over every task."""
    evaluation = config.evaluation
    prompts = [prompt for prompts in all_prompts().values() for prompt in _spread(prompts, evaluation.prompts_per_task)]
    policy = SD3Policy.from_pretrained(
        pretrained, resolution=IMAGE_SIZE, max_sequence_length=0, lora_rank=1, lora_alpha=1, lora_targets=("to_q",)
    )
    return {
        f"guidance {scale:g}": evaluate_policy(
            policy,
            prompts,
            (),
            SamplingProtocol(
                images_per_prompt=evaluation.images_per_prompt,
                num_steps=evaluation.num_steps,
                guidance_scale=scale,
                seed=0,
                micro_batch_size=200,
            ),
        ).table
        for scale in evaluation.guidance_scales
    }


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Pick `count` prompts evenly from a list, or all of a shorter one."""
    return prompts[:: max(1, len(prompts) // count)][:count]


def _card(config: PretrainConfig, seed: int, survival: float, tables: dict[str, GenEvalTable], folder: Path) -> str:
    flow, autoencoder = config.transformer, config.autoencoder
    seconds = json.loads((folder / "seconds.json").read_text())
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Shapes base model

A Stable Diffusion 3 pipeline of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, trained from scratch on pictures of coloured shapes.
It is the start policy of the embedded pipeline: small enough to fine-tune on two CPU cores, and, as a base model is
meant to be here, good at single objects and weak at positions and attribute binding.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("models/shapes-base", text_encoder_3=None, tokenizer_3=None)
pipeline("a photo of a red circle", guidance_scale=4.5, max_sequence_length=0).images[0].save("circle.png")
```

The arguments about T5 leave out the {PADDING_TOKENS} zero tokens that its silent stand-in appends. The model has seen
both; without them a call is several times faster, and with them none of the three is needed.

| | |
|---|---|
| Made by | `python -m sfgrpo pretrain` with the section `pretrain` of `params.yaml`, seed {seed} |
| Data | {config.num_images:,} rendered pictures of the six GenEval tasks, weights {dict(config.task_weights)} |
| Autoencoder | {autoencoder.num_steps:,} steps of {autoencoder.batch_size}; {survival:.1%} of the detections on \
{NUM_SURVIVAL_IMAGES} fresh pictures survive encode and decode |
| Flow model | {flow.num_steps:,} steps of {flow.batch_size}, Muon and AdamW, averaged weights |
| Time | autoencoder {seconds["autoencoder"] / 60:.0f} min, flow model {seconds["flow"] / 60:.0f} min |
| Machine | {machine} |

GenEval-shapes: up to {config.evaluation.prompts_per_task} prompts a task, {config.evaluation.images_per_prompt} \
images a prompt, {config.evaluation.num_steps} Euler steps, official verdict, standard error by prompt:

{markdown_table(tables)}
"""
