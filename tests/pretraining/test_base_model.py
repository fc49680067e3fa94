"""The making of the base model, in miniature: a folder with a card and a manifest, resumable at every stage."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from sfgrpo.config.pretrain_schema import PretrainConfig
from sfgrpo.config.stages import PretrainStage, load_config
from sfgrpo.pretraining import base_model
from sfgrpo.pretraining.base_model import pretrain_base_model
from sfgrpo.runtime.manifest import verify_manifest


@pytest.fixture
def config(pytestconfig: pytest.Config) -> PretrainConfig:
    whole = load_config(PretrainStage, pytestconfig.rootpath / "params.yaml").pretrain
    return dataclasses.replace(
        whole,
        num_images=40,
        autoencoder=dataclasses.replace(whole.autoencoder, num_images=20, num_steps=2, batch_size=4),
        transformer=dataclasses.replace(
            whole.transformer,
            num_layers=1,
            num_attention_heads=1,
            attention_head_dim=8,
            num_steps=4,
            batch_size=4,
            warmup_steps=1,
            bfloat16=False,
            compile=False,
        ),
        evaluation=dataclasses.replace(
            whole.evaluation, prompts_per_task=1, images_per_prompt=1, num_steps=1, guidance_scales=(1.0, 2.0)
        ),
    )


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base_model, "NUM_SURVIVAL_IMAGES", 8)
    monkeypatch.setattr(base_model, "SAVE_EVERY_NUM_STEPS", 2)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_base_model_comes_with_card_and_manifest(config):
    Path("models").mkdir()
    pretrain_base_model(config, 0, Path("scratch"))
    base = base_model.BASE_MODEL
    verify_manifest(base)
    card = (base / "README.md").read_text()
    assert "| Flow model | 4 steps of 4," in card and "| Data | 40 rendered pictures" in card
    assert re.search(r"^\| guidance 1 \|.*\n\| guidance 2 \|", card, re.MULTILINE)
    assert set(json.loads(Path("scratch/seconds.json").read_text())) == {"autoencoder", "flow"}
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    assert pipeline.scheduler.config.shift == config.transformer.shift
    assert pipeline.vae.config.scaling_factor != 1.0

    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(example, {})
    assert Path("circle.png").exists()


def refuse(*arguments, **options):
    raise AssertionError("this was done already")


def test_second_call_goes_on_where_the_first_was_stopped(config, monkeypatch):
    Path("models").mkdir()
    pretrain_base_model(config, 0, Path("whole"))
    expected = weights(base_model.BASE_MODEL)

    original = base_model.FlowTraining.save

    def save_and_stop(training, path):
        original(training, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model.FlowTraining, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain_base_model(config, 0, Path("parts"))
    monkeypatch.setattr(base_model.FlowTraining, "save", original)
    monkeypatch.setattr(base_model, "train_autoencoder", refuse)
    torch.manual_seed(123)
    pretrain_base_model(config, 0, Path("parts"))
    assert weights(base_model.BASE_MODEL) == expected


@pytest.mark.parametrize(
    ("length", "count", "picked"), [(10, 3, [0, 3, 6]), (2, 5, [0, 1]), (6, 6, [0, 1, 2, 3, 4, 5])]
)
def test_prompts_are_spread_over_the_whole_list(length, count, picked):
    assert base_model._spread(list(range(length)), count) == picked
