"""The CLIP reward: PickScore's formula against transformers' own forward, its preprocessing, its cache, its model."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sfgrpo.errors import IntegrityError
from sfgrpo.geneval.grammar import colors, single_object
from sfgrpo.pretraining.clip import build_clip, meaning
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.pretraining.pipeline import build_tokenizer
from sfgrpo.rewards import build_reward
from sfgrpo.rewards import clip as module
from sfgrpo.rewards.clip import ClipReward, preprocess
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.types import TAGS, Prompt

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PROMPTS = [colors("circle", "red"), single_object("ring"), colors("heart", "blue")]


@pytest.fixture
def model() -> CLIPModel:
    untrained = build_clip(build_tokenizer(), width=16, num_layers=1, patch_size=8)
    # An odd scale, so that the formula and not the shipped scale of 26 is tested.
    untrained.logit_scale.data.fill_(math.log(70.0))
    return untrained


@pytest.fixture
def reward(model) -> ClipReward:
    return ClipReward(model, build_tokenizer(), mean=MEAN, std=STD)


@pytest.fixture
def shipped(pytestconfig) -> Path:
    return pytestconfig.rootpath / "models/shapes-clip"


def smooth_images(height: int, width: int, count: int = 3) -> np.ndarray:
    """Pictures without an edge, whose resize hardly depends on the rounding in between."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(40, 216, size=(count, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]
    )


def their_pixels(images: np.ndarray, size: int) -> torch.Tensor:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    return processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (40, 33), (20, 31)])
def test_preprocessing_is_the_image_processors(height, width):
    images = smooth_images(height, width)
    ours = preprocess(torch.from_numpy(images), size=32, mean=MEAN, std=STD)
    one_level = 1 / 255 / min(STD)
    torch.testing.assert_close(ours, their_pixels(images, 32), rtol=0, atol=1.01 * one_level)


def test_preprocessing_of_the_right_size_is_exact():
    images = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    ours = preprocess(torch.from_numpy(images), size=32, mean=MEAN, std=STD)
    torch.testing.assert_close(ours, their_pixels(images, 32), rtol=0, atol=1e-6)


def test_score_is_the_logit_of_transformers_own_forward_over_26(reward, model):
    images = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    texts = [prompt.text for prompt in PROMPTS]
    tokens = build_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(pixel_values=their_pixels(images, 32), **tokens).logits_per_image
    torch.testing.assert_close(reward(images, PROMPTS), theirs.diagonal() / 26, rtol=1e-4, atol=1e-6)


def test_many_images_are_scored_in_pieces(reward, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(7, 32, 32, 3), dtype=np.uint8)
    prompts = [PROMPTS[index % 3] for index in range(7)]
    whole = reward(images, prompts)
    monkeypatch.setattr(module, "MICRO_BATCH_SIZE", 3)
    torch.testing.assert_close(reward(images, prompts), whole, rtol=0, atol=1e-6)


def test_a_text_is_embedded_once(reward, model, monkeypatch):
    asked = []
    original = model.get_text_features

    def watched(input_ids):
        asked.append(input_ids)
        return original(input_ids=input_ids)

    monkeypatch.setattr(model, "get_text_features", watched)
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    for _ in range(3):
        reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert len(asked) == 2


def test_the_cache_of_texts_is_bounded(model, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_TEXTS", 2)
    reward = ClipReward(model, build_tokenizer(), mean=MEAN, std=STD)
    for prompt in PROMPTS:
        reward(np.zeros((1, 32, 32, 3), dtype=np.uint8), [prompt])
    assert reward._text.cache_info().currsize == 2


def test_a_text_beyond_the_models_length_is_cut_off(reward):
    long = Prompt(text="a photo of " + "a red circle and " * 9, tag="two_object", include=PROMPTS[0].include)
    assert reward(np.zeros((1, 32, 32, 3), dtype=np.uint8), [long]).isfinite().all()


def test_the_model_is_frozen_and_in_evaluation_mode(reward, model):
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())


def test_importing_the_rewards_does_not_import_transformers(pytestconfig):
    code = "import sys, sfgrpo.rewards; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pytestconfig.rootpath).returncode == 0


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder with a config.json; .* needs reward.revision"):
        build_reward("clip", pretrained=str(tmp_path / "nowhere"))


def test_a_damaged_model_is_refused(tmp_path, shipped):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors is damaged"):
        build_reward("clip", pretrained=str(copy))


@pytest.mark.parametrize(
    ("pretrained", "processor", "pinned"),
    [
        ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {}),
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", {"revision": "abc"}),
    ],
)
def test_pickscore_takes_its_processor_from_the_model_its_card_names(monkeypatch, model, pretrained, processor, pinned):
    sources = {}

    def loader(name, result):
        def load(source, **options):
            sources[name] = source, options
            return result

        return load

    settings = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD)
    monkeypatch.setattr(CLIPModel, "from_pretrained", loader("model", model))
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", loader("tokenizer", build_tokenizer()))
    monkeypatch.setattr(CLIPImageProcessorPil, "from_pretrained", loader("images", settings))
    build_reward("clip", pretrained=pretrained, revision="abc")
    assert sources["model"] == (
        pretrained,
        {"revision": "abc", "dtype": torch.float32, "use_safetensors": True},
    )
    assert sources["tokenizer"] == sources["images"] == (processor, pinned)


@pytest.mark.parametrize("tag", TAGS)
def test_the_shipped_model_knows_the_right_caption_from_fifteen_others(shipped, tag):
    reward, generator = build_reward("clip", pretrained=str(shipped)), np.random.default_rng(0)
    pictures = render_pictures(60, dict.fromkeys(TAGS, 0.0) | {tag: 1.0}, seed=11)
    space, hits = all_prompts()[tag], []
    for image, index in zip(pictures.images, pictures.prompt_index, strict=True):
        own = pictures.prompts[index]
        others = [space[other] for other in generator.permutation(len(space)) if meaning(space[other]) != meaning(own)]
        choices = [own, *others[:15]]
        hits.append(int(reward(np.stack([image] * len(choices)), choices).argmax()) == 0)
    assert np.mean(hits) > 2 / 3
