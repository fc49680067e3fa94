"""A small CLIP of the shapes world: captions and pictures in one space, trained by contrast alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from sfgrpo.config.pretrain_schema import PretrainRewardConfig
from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.pretraining.autoencoder import to_pixels
from sfgrpo.pretraining.dataset import Pictures
from sfgrpo.pretraining.optimization import Optimizers, make_optimizers, take_step
from sfgrpo.pretraining.pipeline import TEXT_WIDTH, text_config, tokenize
from sfgrpo.rewards.clip import embed_images, embed_texts
from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE
from sfgrpo.types import TAGS, Prompt, Relation, Tag

LOGIT_SCALE = 26.0
"""Inverse temperature of the contrast, not trained: PickScore's formula, scale * cosine / 26, then gives the cosine."""
POSITION_SCALE = 0.05
"""Amplitude of the waves with which the position embeddings start: about that of a patch."""
CORNER = 3
"""Classes and colours of a corner of the world: captions that share them differ in how they are put together."""
STRANGERS = 0.5
"""Pictures of other tasks in a batch, as a share of its own: negatives of every caption that asks for other objects."""
SHIFT = 2
"""Most pixels by which a picture is moved."""
MAX_NOISE = 0.15
"""Standard deviation of the strongest noise, in pixels of -1..1."""
WARMUP = 0.05
"""Share of the steps over which the learning rates rise; then they fall along a cosine."""

SIMPLE: tuple[Tag, ...] = ("single_object", "colors")
"""Tasks that show one object."""
MIRRORED: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def build_clip(tokenizer: CLIPTokenizer, *, width: int, num_layers: int, patch_size: int) -> CLIPModel:
    """Return the untrained CLIP: a vision transformer of `num_layers` and a text transformer of two layers.

    Weights are drawn from torch's global generator: seed it first.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, width // 16),
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
        hidden_act="gelu",
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer, hidden_act="gelu").to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=TEXT_WIDTH,
            logit_scale_init_value=math.log(LOGIT_SCALE),
        )
    )
    model.logit_scale.requires_grad_(False)
    _place_patches(model)
    return model


@torch.no_grad()
def _place_patches(model: CLIPModel) -> None:
    """Initialise the position embeddings as waves: one half encodes a patch's row, the other its column."""
    table = model.vision_model.embeddings.position_embedding.weight
    side = math.isqrt(len(table) - 1)
    frequencies = math.pi * torch.linspace(1 / side, 1.0, table.shape[1] // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    down, right = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    table[1:] = POSITION_SCALE * torch.cat([down, right], dim=2).flatten(0, 1)


def meaning(prompt: Prompt) -> Hashable:
    """Return a key of what a prompt asks for: "a A left of a B" shares that of "a B right of a A"; see `twin_key`."""
    if prompt.tag == "position":
        target, placed = prompt.include
        assert placed.position is not None, "the second clause of a position prompt is placed"
        relation = placed.position[0]
        first = (placed.class_name, relation, target.class_name)
        second = (target.class_name, MIRRORED[relation], placed.class_name)
        return prompt.tag, min(first, second)
    return twin_key(prompt)


def contents(prompt: Prompt) -> Hashable:
    """Return a key of the objects that a prompt asks for, whatever their colours and places."""
    counts: Counter[str] = Counter()
    for clause in prompt.include:
        counts[clause.class_name] += clause.count
    return frozenset(counts.items())


def contrastive_loss(texts: Tensor, images: Tensor, excused: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020): the mean of -log softmax over pictures, and over captions.

    Row i of `texts` [N, D] belongs to row i of `images` [M, D]; pictures from N on belong to no caption and are only
    negatives. `excused` [N, M] marks other pairs that are no negatives.
    """
    num_pairs = len(texts)
    excused = excused & ~torch.eye(*excused.shape, dtype=torch.bool)
    logits = (LOGIT_SCALE * texts @ images.T).masked_fill(excused, -math.inf)
    target = torch.arange(num_pairs)
    by_text = nn.functional.cross_entropy(logits, target)
    by_image = nn.functional.cross_entropy(logits[:, :num_pairs].T, target)
    return (by_text + by_image) / 2


def degrade(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shift, blur, fade and add noise to pixels [N, 3, H, W], as in samples of an imperfect model.

    All pictures are shifted alike; the rest differs by picture and is scaled by `strength` in 0..1.
    """
    count = len(pixels)

    def drawn() -> Tensor:
        return strength * torch.rand(count, 1, 1, 1, generator=generator)

    padded = nn.functional.pad(pixels, (SHIFT,) * 4, mode="replicate")
    shift = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    moved = padded[:, :, shift[0] : shift[0] + pixels.shape[2], shift[1] : shift[1] + pixels.shape[3]]
    soft = moved
    for _ in range(2):
        soft = nn.functional.avg_pool2d(nn.functional.pad(soft, (1,) * 4, mode="replicate"), 3, stride=1)
    blurred = torch.lerp(moved, soft, drawn().square())
    ground = blurred.flatten(2).median(dim=2).values[..., None, None]
    faded = torch.lerp(blurred, ground, 0.5 * drawn().square()) + 0.1 * (drawn() - 0.5 * strength)
    noise = torch.randn(pixels.shape, generator=generator)
    return (faded + MAX_NOISE * drawn().square() * noise).clamp(-1.0, 1.0)


class _Batches:
    """The rows of each step: pictures of one task, and strangers from all tasks."""

    def __init__(self, pictures: Pictures, config: PretrainRewardConfig) -> None:
        self._config = config
        tags = np.array([TAGS.index(prompt.tag) for prompt in pictures.prompts])[pictures.prompt_index]
        self._rows = {tag: np.flatnonzero(tags == index) for index, tag in enumerate(TAGS)}
        self._index = pictures.prompt_index
        self._used = np.zeros((len(pictures.prompts), len(CLASSES) + len(COLORS)), dtype=bool)
        for row, prompt in enumerate(pictures.prompts):
            for clause in prompt.include:
                self._used[row, CLASSES.index(clause.class_name)] = True
                if clause.color is not None:
                    self._used[row, len(CLASSES) + COLORS.index(clause.color)] = True

    def draw(self, step: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the rows of a batch, half of the time from a corner of its task, and of its strangers."""
        config = self._config
        simple = step < config.simple_fraction * config.num_steps
        weights = np.array([config.task_weights[tag] if tag in SIMPLE or not simple else 0.0 for tag in TAGS])
        rows = self._rows[TAGS[generator.choice(len(TAGS), p=weights / weights.sum())]]
        if generator.random() < 0.5:
            rows = self._corner(rows, generator)
        size = config.batch_size
        return generator.choice(rows, size=size), generator.integers(len(self._index), size=round(STRANGERS * size))

    def _corner(self, rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        kept = np.zeros(len(CLASSES) + len(COLORS), dtype=bool)
        kept[generator.choice(len(CLASSES), size=CORNER, replace=False)] = True
        kept[len(CLASSES) + generator.choice(len(COLORS), size=CORNER, replace=False)] = True
        inside = np.asarray(~(self._used & ~kept).any(axis=1))
        chosen = rows[inside[self._index[rows]]]
        return chosen if len(chosen) else rows


def train_clip(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, config: PretrainRewardConfig, seed: int
) -> Iterator[tuple[int, float]]:
    """Train in place; yield (steps done, loss). A step's randomness depends on seed and step alone."""
    token_ids = tokenize(tokenizer, [prompt.text for prompt in pictures.prompts])
    meanings, objects = (_numbered(key(prompt) for prompt in pictures.prompts) for key in (meaning, contents))
    batches = _Batches(pictures, config)
    optimizers = _optimizers(model, config)
    for step in range(config.num_steps):
        rows, strangers = batches.draw(step, np.random.default_rng((seed, step)))
        own, other = pictures.prompt_index[rows], pictures.prompt_index[strangers]
        same = meanings[own][:, None] == meanings[own]
        alike = objects[own][:, None] == objects[other]
        excused = torch.from_numpy(np.concatenate([same, alike], axis=1))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        clean = to_pixels(pictures.images[np.concatenate([rows, strangers])])
        pixels = degrade(clean, step / config.num_steps, generator)
        unique, inverse = np.unique(own, return_inverse=True)
        texts = embed_texts(model, token_ids[torch.from_numpy(unique)])[torch.from_numpy(inverse)]
        loss = contrastive_loss(texts, embed_images(model, pixels), excused)
        loss.backward()
        take_step(optimizers, model.parameters(), _learning_rate_factor(step, config.num_steps))
        yield step + 1, loss.item()


@torch.no_grad()
def retrieval_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, *, num_choices: int = 16, seed: int = 0
) -> dict[Tag, float]:
    """Return, by task, how often a picture is closest to its own caption among `num_choices` of its task.

    The others are drawn without replacement from the captions that mean something else, or are all there are.
    """
    generator = np.random.default_rng(seed)
    texts = embed_texts(model, tokenize(tokenizer, [prompt.text for prompt in pictures.prompts]))
    batches = to_pixels(pictures.images).split(256)
    cosines = (torch.cat([embed_images(model, batch) for batch in batches]) @ texts.T).numpy()
    meanings = _numbered(meaning(prompt) for prompt in pictures.prompts)
    tags = np.array([prompt.tag for prompt in pictures.prompts])
    hits: dict[Tag, list[bool]] = {tag: [] for tag in TAGS}
    for row, own in zip(cosines, pictures.prompt_index, strict=True):
        others = np.flatnonzero((tags == tags[own]) & (meanings != meanings[own]))
        drawn = generator.choice(others, size=min(num_choices - 1, len(others)), replace=False)
        hits[pictures.prompts[own].tag].append(bool(row[own] > row[drawn].max()))
    return {tag: float(np.mean(found)) for tag, found in hits.items() if found}


def _optimizers(model: CLIPModel, config: PretrainRewardConfig) -> Optimizers:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return make_optimizers(trained, lambda name: ".layers." in name, config)


def _learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak rates: linear warm-up, then half a cosine down to zero."""
    done = (step + 1) / num_steps
    return min(done / WARMUP, 0.5 * (1.0 + math.cos(math.pi * max(0.0, done - WARMUP) / (1.0 - WARMUP))))


def _numbered(keys: Iterator[Hashable]) -> NDArray[np.int64]:
    """Replace keys by numbers, equal keys by equal numbers."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
