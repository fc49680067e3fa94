"""Training of the shapes CLIP: its contrast in naive loops, its batches, its drafts, and what it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfgrpo.config.pretrain_schema import PretrainRewardConfig
from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.pretraining import clip
from sfgrpo.pretraining.clip import (
    LOGIT_SCALE,
    SIMPLE,
    build_clip,
    contents,
    contrastive_loss,
    degrade,
    meaning,
    retrieval_accuracy,
    train_clip,
)
from sfgrpo.pretraining.dataset import Pictures, render_pictures
from sfgrpo.pretraining.pipeline import build_tokenizer
from sfgrpo.shapes.world import CLASSES, COLORS
from sfgrpo.types import TAGS, Prompt

PICTURES = render_pictures(240, dict.fromkeys(TAGS, 1.0), seed=0)
TOKENIZER = build_tokenizer()
CONFIG = PretrainRewardConfig(
    num_images=240,
    patch_size=8,
    width=16,
    num_layers=1,
    num_steps=40,
    batch_size=16,
    learning_rate=2e-3,
    muon_learning_rate=4e-3,
    task_weights=dict.fromkeys(TAGS, 1.0) | {"single_object": 0.0},
    simple_fraction=0.5,
)


def untrained():
    torch.manual_seed(0)
    return build_clip(TOKENIZER, width=16, num_layers=1, patch_size=8)


def trained(num_steps: int):
    model = untrained()
    steps = train_clip(model, TOKENIZER, PICTURES, CONFIG, seed=1)
    losses = [loss for _, loss in (next(steps) for _ in range(num_steps))]
    return model, losses


def directions(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_contrastive_loss_is_that_of_naive_loops():
    texts, images = directions(3, 5), directions(5, 5)
    excused = torch.zeros(3, 5, dtype=torch.bool)
    for row, column in ((0, 0), (0, 2), (2, 0), (1, 4)):
        excused[row, column] = True
    total = 0.0
    for own in range(3):
        likeness = {
            (text, image): math.exp(LOGIT_SCALE * float(texts[text] @ images[image]))
            for text in range(3)
            for image in range(5)
            if text == image or not excused[text, image]
        }
        by_text = sum(value for (text, _), value in likeness.items() if text == own)
        by_image = sum(value for (_, image), value in likeness.items() if image == own)
        total -= math.log(likeness[own, own] / by_text) + math.log(likeness[own, own] / by_image)
    assert contrastive_loss(texts, images, excused).item() == pytest.approx(total / 6)


def test_excused_pairs_do_not_repel_each_other():
    texts, images = directions(2, 4), directions(2, 4)
    assert contrastive_loss(texts, images, torch.ones(2, 2, dtype=torch.bool)).item() == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (two_object("circle", "ring"), two_object("ring", "circle")),
        (color_attr("circle", "ring", "red", "blue"), color_attr("ring", "circle", "blue", "red")),
        (position("circle", "ring", "left of"), position("ring", "circle", "right of")),
        (position("circle", "ring", "below"), position("ring", "circle", "above")),
    ],
)
def test_twins_mean_the_same(one, other):
    assert meaning(one) == meaning(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (color_attr("circle", "ring", "red", "blue"), color_attr("circle", "ring", "blue", "red")),
        (position("circle", "ring", "left of"), position("ring", "circle", "left of")),
        (position("circle", "ring", "left of"), position("circle", "ring", "above")),
        (counting("circle", 2), counting("circle", 3)),
        (single_object("circle"), colors("circle", "red")),
    ],
)
def test_other_prompts_mean_something_else(one, other):
    assert meaning(one) != meaning(other)


def test_contents_are_classes_and_counts_and_nothing_else():
    pair = two_object("circle", "ring")
    assert contents(pair) == contents(position("ring", "circle", "above"))
    assert contents(pair) == contents(color_attr("circle", "ring", "red", "blue"))
    assert len({contents(prompt) for prompt in (pair, counting("ring", 2), colors("ring", "red"))}) == 3


def test_clean_drafts_are_pictures_that_moved():
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    draft = degrade(pixels, 0.0, torch.Generator().manual_seed(0))
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    rolled = [torch.roll(pixels, move, dims=(2, 3))[:, :, 2:-2, 2:-2] for move in moves]
    assert sum(torch.allclose(draft[:, :, 2:-2, 2:-2], one, atol=1e-6) for one in rolled) == 1


def test_drafts_follow_their_generator_and_stay_in_range():
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    one, again, other = (degrade(pixels, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.abs().max() <= 1.0


def drawn_prompts(step: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    batches = clip._Batches(PICTURES, CONFIG)
    found = batches.draw(step, np.random.default_rng(seed))
    own, strangers = ([PICTURES.prompts[PICTURES.prompt_index[row]] for row in rows] for rows in found)
    return own, strangers


def test_a_batch_is_of_one_task_and_its_strangers_of_any():
    drawn = [drawn_prompts(CONFIG.num_steps - 1, seed) for seed in range(40)]
    tags = [{prompt.tag for prompt in own} for own, _ in drawn]
    assert all(len(found) == 1 for found in tags)
    assert set.union(*tags) == set(TAGS) - {"single_object"}
    assert all(len({prompt.tag for prompt in strangers}) > 1 for _, strangers in drawn)


def test_the_first_steps_show_one_object():
    for seed in range(20):
        assert {prompt.tag for prompt in drawn_prompts(0, seed)[0]} <= set(SIMPLE)


def test_every_other_batch_is_a_corner_of_the_world():
    drawn = [drawn_prompts(CONFIG.num_steps - 1, seed)[0] for seed in range(60)]
    words = [{clause.class_name for prompt in own for clause in prompt.include} for own in drawn]
    assert 0.3 < np.mean([len(found) <= clip.CORNER for found in words]) < 0.7


def test_every_weight_is_trained_by_one_optimizer_and_the_scale_by_none():
    model = untrained()
    optimizers = clip._optimizers(model, CONFIG)
    trained_by = [
        id(value) for one, _ in optimizers.values() for group in one.param_groups for value in group["params"]
    ]
    named = {name: id(value) for name, value in model.named_parameters()}
    scale = named.pop("logit_scale")
    assert sorted(trained_by) == sorted(named.values()) and scale not in trained_by
    assert model.logit_scale.exp().item() == pytest.approx(LOGIT_SCALE)


def test_position_embeddings_start_with_a_half_for_the_row_and_a_half_for_the_column():
    table = untrained().vision_model.embeddings.position_embedding.weight[1:].detach().view(4, 4, 16)
    rows, columns = table[..., :8], table[..., 8:]
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows[:, 0], columns[0])
    assert torch.pdist(rows[:, 0]).min() > 0.05


@pytest.mark.parametrize(("step", "factor"), [(0, 0.2), (4, 1.0), (99, 0.0)])
def test_learning_rate_rises_then_falls_to_nothing(step, factor):
    assert clip._learning_rate_factor(step, 100) == pytest.approx(factor, abs=1e-9)


def test_training_lowers_the_loss():
    _, losses = trained(40)
    assert np.mean(losses[12:20]) < 0.95 * np.mean(losses[:3]), "of one object"


def test_training_is_the_same_every_time():
    (first, losses), (second, again) = trained(3), trained(3)
    assert losses == again
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def pictures_of(prompts: list[Prompt]) -> Pictures:
    """One picture for every prompt; its first pixel is the prompt's number."""
    images = np.zeros((len(prompts), 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(prompts))
    return Pictures(images=images, prompts=tuple(prompts), prompt_index=np.arange(len(prompts)))


@pytest.mark.parametrize(("offset", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_retrieval_counts_how_often_the_own_caption_wins(monkeypatch, offset, accuracy):
    pictures = pictures_of([colors(name, color) for name in CLASSES for color in COLORS])
    one_hot = torch.eye(len(pictures.prompts))

    def number(model, pixels):
        return one_hot[(pixels[:, 0, 0, 0].add(1).mul(127.5).round().long() + offset) % len(one_hot)]

    monkeypatch.setattr(clip, "embed_images", number)
    monkeypatch.setattr(clip, "embed_texts", lambda model, token_ids: one_hot)
    assert retrieval_accuracy(None, TOKENIZER, pictures) == {"colors": accuracy}


def test_twins_do_not_compete_in_retrieval(monkeypatch):
    pictures = pictures_of([two_object("circle", "ring"), two_object("ring", "circle"), two_object("ring", "cross")])
    monkeypatch.setattr(clip, "embed_images", lambda model, pixels: torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]]))
    monkeypatch.setattr(clip, "embed_texts", lambda model, ids: torch.tensor([[0.9, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert retrieval_accuracy(None, TOKENIZER, pictures) == {"two_object": 1.0}
