"""The making of the reward model, in miniature, and the shipped one: intact, small, and honest about itself."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sfgrpo.config.pretrain_schema import PretrainRewardConfig
from sfgrpo.config.stages import PretrainRewardStage, load_config
from sfgrpo.pretraining import reward_model
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.pretraining.reward_model import REWARD_MODEL, pretrain_reward_model
from sfgrpo.rewards import build_reward
from sfgrpo.runtime.manifest import verify_manifest
from sfgrpo.types import TAGS

MAX_BYTES = 2_500_000


@pytest.fixture
def recipe(pytestconfig) -> PretrainRewardConfig:
    return load_config(PretrainRewardStage, pytestconfig.rootpath / "params.yaml").pretrain_reward


@pytest.fixture
def miniature(recipe, monkeypatch) -> PretrainRewardConfig:
    monkeypatch.setattr(reward_model, "NUM_FRESH_IMAGES", 30)
    monkeypatch.setattr(reward_model, "LOG_EVERY_NUM_STEPS", 2)
    return dataclasses.replace(recipe, num_images=60, width=16, num_layers=1, num_steps=2, batch_size=4)


@pytest.fixture
def shipped(pytestconfig) -> Path:
    return pytestconfig.rootpath / REWARD_MODEL


def test_reward_model_comes_with_card_preprocessing_and_manifest(miniature, tmp_path):
    pretrain_reward_model(miniature, 3, tmp_path / "clip")
    verify_manifest(tmp_path / "clip")
    card = (tmp_path / "clip/README.md").read_text()
    assert "| Data | 60 rendered pictures" in card and "| Training | 2 steps of 4 pairs and 2 other" in card
    assert "seed 3" in card and re.search(r"^\| single_object \| .*\n\|.*\n(\| \d\.\d\d ){6}\|$", card, re.MULTILINE)
    settings = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    assert (settings.size["shortest_edge"], settings.crop_size["height"]) == (32, 32)


def test_reward_model_is_loaded_as_a_reward(miniature, tmp_path):
    pretrain_reward_model(miniature, 0, tmp_path / "clip")
    pictures = render_pictures(3, dict.fromkeys(TAGS, 1.0), seed=0)
    asked = [pictures.prompts[index] for index in pictures.prompt_index]
    assert build_reward("clip", pretrained=str(tmp_path / "clip"))(pictures.images, asked).abs().max() <= 1.0


def test_the_same_seed_makes_the_same_model(miniature, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        pretrain_reward_model(miniature, seed, tmp_path / name)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_shipped_files_are_those_of_the_manifest(shipped):
    verify_manifest(shipped)


def test_shipped_model_is_small_and_free_of_pickles(shipped):
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


def test_shipped_model_is_what_params_yaml_says(shipped, recipe):
    card = (shipped / "README.md").read_text(encoding="utf-8")
    for fact in (f"{recipe.num_images:,} rendered", f"{recipe.num_steps:,} steps of {recipe.batch_size} pairs"):
        assert fact in card
    vision = json.loads((shipped / "config.json").read_text())["vision_config"]
    shape = {"hidden_size": recipe.width, "num_hidden_layers": recipe.num_layers, "patch_size": recipe.patch_size}
    assert shape.items() <= vision.items()


def test_the_lines_of_the_card_load_it(shipped, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    (example,) = re.findall(r"```python\n(.*?)```", (shipped / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    assert isinstance(scope["model"], CLIPModel) and isinstance(scope["tokenizer"], CLIPTokenizer)
