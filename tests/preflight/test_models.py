"""Models of another kind are named by what they are, before any of their weights is read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.config.stages import TrainStage, load_config
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.preflight import models
from sfgrpo.preflight.models import COMPONENTS, check_base_model, check_reward_model
from sfgrpo.training.fingerprint import _models_digest
from tests.support.paths import ROOT
from tests.support.tiny_run import TINY, inside, write_params

BASE, CLIP = ROOT / "models/shapes-base", ROOT / "models/shapes-clip"
HUB = "stabilityai/stable-diffusion-3.5-medium"


def policy(pretrained: Path | str, **changes: object) -> PolicyConfig:
    config = load_config(TrainStage, ROOT / "params.yaml").policy
    return dataclasses.replace(config, pretrained=str(pretrained), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the shipped base model, whose weights are a few bytes."""
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    for component in models.WITH_WEIGHTS:
        (tmp_path / "base" / component / "model.safetensors").write_bytes(b"12345678")
    return tmp_path / "base"


def write_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def single_transformer(folder: Path) -> None:
    kept = (folder / "transformer/config.json").read_text()
    empty(folder)
    (folder / "config.json").write_text(kept)
    (folder / "model.safetensors").write_bytes(b"12345678")


def single_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"12345678")


def bare_weights(folder: Path) -> None:
    empty(folder)
    (folder / "sd3.safetensors").write_bytes(b"12345678")


def pickled(folder: Path) -> None:
    (folder / "transformer/model.safetensors").rename(folder / "transformer/model.bin")


def lacking_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "transformer/model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "FLUX": (lambda at: write_index(at, _class_name="FluxPipeline"), "is a FluxPipeline; a diffusers StableDiffusion3"),
    "SDXL": (lambda at: write_index(at, _class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline; "),
    "image to image": (lambda at: write_index(at, _class_name="StableDiffusion3Img2ImgPipeline"), "is a StableDiff"),
    "no class": (lambda at: write_index(at, _class_name=None), "is a pipeline without a class; a diffusers"),
    "no JSON": (lambda at: (at / "model_index.json").write_text("{"), "holds a model_index.json that is no JSON"),
    "bytes": (lambda at: (at / "model_index.json").write_bytes(b"\xff"), "holds a model_index.json that is no JSON"),
    "a list": (
        lambda at: (at / "model_index.json").write_text("[]"),
        "holds a model_index.json that is no JSON object",
    ),
    "no index": (lambda at: (at / "model_index.json").unlink(), "is a folder without model_index.json or config.json"),
    "empty folder": (empty, "is an empty folder; a diffusers StableDiffusion3Pipeline"),
    "transformer only": (single_transformer, "is a single SD3Transformer2DModel and no pipeline"),
    "single file": (single_file, "is a file, perhaps a checkpoint of all weights in one, and no folder"),
    "bare weights": (bare_weights, "is a folder of weights without a description of them"),
    "pickles": (pickled, "is incomplete: transformer has its weights in pickles"),
    "a missing shard": (lacking_shard, "is incomplete: transformer lacks model-2.safetensors; download it again"),
    "an empty file": (
        lambda at: (at / "vae/model.safetensors").write_bytes(b""),
        "is incomplete: vae has an empty model.safetensors; download it again, or run `git lfs pull`",
    ),
    "another transformer": (
        lambda at: write_index(at, transformer=["diffusers", "FluxTransformer2DModel"]),
        "has a transformer of class FluxTransformer2DModel in its model_index.json, where SD3Transformer2DModel is",
    ),
    "odd entry": (lambda at: write_index(at, vae="AutoencoderKL"), "has a vae of class None in its model_index.json"),
    "no patch size": (
        lambda at: (at / "transformer/config.json").write_text("{}"),
        "has a config.json of vae or .* 'patch_size'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folder_of_another_kind_is_refused_by_what_it_is(folder, case):
    spoil, complaint = BROKEN[case]
    assert "is a StableDiffusion3Pipeline" in check_base_model(policy(folder))
    spoil(folder)
    with pytest.raises(ConfigError, match=rf"^policy\.pretrained: {folder} {complaint}"):
        check_base_model(policy(folder))
    with pytest.raises(ConfigError, match=complaint):
        # A commit of the hub makes no model of a folder.
        check_base_model(policy(folder, revision="main"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_that_is_missing_is_named(folder, component):
    shutil.rmtree(folder / component)
    with pytest.raises(ConfigError, match=f"lacks the folder {component} that its model_index.json names; restore it"):
        check_base_model(policy(folder))


def test_missing_t5_matters_only_where_it_is_used(folder):
    write_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    check_base_model(policy(folder))
    with pytest.raises(ConfigError, match="has no text_encoder_3, the T5 encoder; set policy"):
        check_base_model(policy(folder, max_sequence_length=77))


@pytest.mark.parametrize(
    ("resolution", "complaint"),
    [
        (36, "policy.resolution 36 is not a multiple of 8 .*; use 32 or 40"),
        (4, "policy.resolution 4 is not a multiple of 8 .*; use 8"),
        (64, "policy.resolution 64 is more than the 32 pixels for which the transformer of .* has positions; use 32"),
        (16384, "policy.resolution 16384 is more than the 32 pixels"),
    ],
)
def test_size_that_the_model_cannot_draw_is_refused_before_it_is_loaded(resolution, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_base_model(policy(BASE, resolution=resolution))


def test_folder_that_is_absent_is_told_from_a_model_of_the_hub():
    with pytest.raises(ConfigError, match=r"models/absent is no folder with a model_index\.json; `git checkout`"):
        check_base_model(policy("models/absent"))


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_root_of_the_disk_is_no_model_and_is_not_read(tmp_path, capsys, kind, monkeypatch):
    changes = {"reward.name": "clip", "reward.pretrained": "/", "reward.revision": "main"}
    changes = {"policy.pretrained": "/", "policy.revision": "main"} if kind == "policy" else changes
    write_params(tmp_path, {**TINY, "policy.pretrained": str(BASE), **changes})
    monkeypatch.setattr("sfgrpo.training.fingerprint.sha256_of_file", lambda path: pytest.fail(f"{path} was read"))
    with inside(tmp_path):
        assert main(["train"]) == 2
    assert f"{kind}.pretrained: / is a folder without model_index.json or config.json" in capsys.readouterr().err


def test_digest_of_models_reads_no_folder_without_a_model(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/x.safetensors").touch()
    config = dataclasses.replace(load_config(TrainStage, ROOT / "params.yaml"), policy=policy(BASE))
    monkeypatch.setattr("sfgrpo.training.fingerprint.sha256_of_file", lambda path: pytest.fail(f"{path} was read"))
    assert _models_digest(dataclasses.replace(config, reward=reward(tmp_path))) == _models_digest(config)


def reward(pretrained: Path | str, revision: str | None = None) -> RewardConfig:
    return RewardConfig(name="clip", pretrained=str(pretrained), revision=revision)


@pytest.mark.parametrize(
    ("pretrained", "complaint"),
    [
        (BASE, "is a pipeline, StableDiffusion3Pipeline; a CLIP of transformers is supported"),
        (BASE / "transformer", "is a model of type None; a CLIP of transformers, whose type is 'clip'"),
        (BASE / "text_encoder", "is a model of type 'clip_text_model'; a CLIP of transformers"),
        (BASE / "text_encoder/model.safetensors", "is a file, perhaps a checkpoint of all weights in one"),
        (ROOT / "docs", r"is a folder without model_index\.json or config\.json"),
        ("absent", r"is no folder with a config\.json; `git checkout` restores the shipped one"),
    ],
)
def test_reward_model_of_another_kind_is_refused_by_what_it_is(pretrained, complaint):
    assert check_reward_model(reward(CLIP)) == f"{CLIP} is a CLIP"
    with pytest.raises(ConfigError, match=rf"^promotion\.held_out\.pretrained: {pretrained} {complaint}"):
        check_reward_model(reward(pretrained), "promotion.held_out")


def test_reward_without_a_model_needs_none():
    assert check_reward_model(RewardConfig(name="geneval")) == "geneval needs no model"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return a folder whose files the hub is said to have; a file `error` names the class of its refusal."""
    from huggingface_hub import errors

    def download(repository: str, name: str, revision: str | None, *, local_files_only: bool = False) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        if (tmp_path / "error").exists():
            kind = getattr(errors, (tmp_path / "error").read_text())
            raise kind.__new__(kind)
        if not (tmp_path / name).exists():
            raise errors.RemoteEntryNotFoundError.__new__(errors.RemoteEntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "error", "complaint"),
    [
        ("GatedRepoError", ConfigError, "is a gated model of the hub; accept its terms on its page, and set HF_TOKEN"),
        ("RepositoryNotFoundError", ConfigError, "is neither a folder here nor a model of the hub; correct the name"),
        ("RevisionNotFoundError", ConfigError, "has no revision main on the hub; correct policy.revision"),
        ("HFValidationError", ConfigError, "is neither a folder here nor a name that a model of the hub could have"),
        ("LocalEntryNotFoundError", SfgrpoError, "is not in the cache of the hub, and the hub cannot be reached"),
        ("OfflineModeIsEnabled", SfgrpoError, "is not in the cache of the hub, and the hub cannot be reached"),
    ],
)
def test_refusal_of_the_hub_has_its_own_cure(hub, kind, error, complaint):
    (hub / "error").write_text(kind)
    with pytest.raises(error, match=rf"policy\.pretrained: {HUB} {complaint}"):
        check_base_model(policy(HUB, revision="main"))


def test_model_of_the_hub_is_known_by_its_index_alone(hub):
    with pytest.raises(ConfigError, match="is a model of the hub without the file that says its kind"):
        check_base_model(policy(HUB, revision="main"))
    for name in ("model_index.json", "vae/config.json", "transformer/config.json"):
        (hub / name).parent.mkdir(exist_ok=True)
        shutil.copy(BASE / name, hub / name)
    assert "is a StableDiffusion3Pipeline" in check_base_model(policy(HUB, revision="main"))
    write_index(hub, _class_name="FluxPipeline")
    with pytest.raises(ConfigError, match="is a FluxPipeline; a diffusers StableDiffusion3Pipeline"):
        check_base_model(policy(HUB, revision="main"))


def test_hub_model_that_is_not_cached_is_named_where_the_hub_is_switched_off(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SfgrpoError, match=r"reward\.pretrained: .*not in the cache of the hub.*unset HF_HUB_OFFLINE"):
        check_reward_model(reward("yuvalkirstain/PickScore_v1", "main"))
