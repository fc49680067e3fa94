"""Model versions in a real MLflow registry: loaded by alias, drawn with, registered once."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import AdapterError, RegistryError
from sfgrpo.registry import drawing
from sfgrpo.registry.register import RegisteredVersion, TrainedAdapter, register_version
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
from tests.support.registry import draw
from tests.support.tiny import build_tiny_adapter, build_tiny_pipeline, make_tiny_policy, tiny_serving

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

SCORES = {"geneval/overall": 0.5, "geneval/position": 0.25}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A store, a base pipeline and two adapters, which the module's tests share."""

    folder: Path
    pipeline: Any

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def register(self, name: str, adapter: str = "adapter_0", **changes: Any) -> RegisteredVersion:
        trained = TrainedAdapter(
            folder=self.folder / adapter,
            metrics=SCORES,
            provenance={"git_commit": "c0ffee", "prompts_sha256": "d1ce"},
            run_id=None,
        )
        serving = tiny_serving(self.folder / "pipeline", num_inference_steps=3)
        target = RegistryConfig(model_name=name, alias="challenger")
        adapter = dataclasses.replace(trained, **changes)
        return register_version(self.uri, "tests", target, adapter, serving, self.folder / ".scratch")

    def draw_directly(self, prompt: str, seed: int) -> np.ndarray:
        image = self.pipeline(
            prompt,
            num_inference_steps=3,
            guidance_scale=1.0,
            height=32,
            width=32,
            max_sequence_length=0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return np.asarray(image)

    def challenger(self, name: str) -> int:
        return int(connect(self.uri).get_model_version_by_alias(name, "challenger").version)

    def version(self, name: str, number: int) -> Any:
        return connect(self.uri).get_model_version(name, str(number))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    pipeline = build_tiny_pipeline(folder / "pipeline")
    # What a max_sequence_length of 0 means.
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    for seed in (0, 1):
        build_tiny_adapter(pipeline, folder / f"adapter_{seed}", seed)
    return Registry(folder=folder, pipeline=pipeline)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    """Compare in steps of 1/255; kernels of other batch sizes or memory layouts round differently by one."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def test_version_draws_by_name_and_alias(registry):
    registry.register("drawing")
    first, second = draw(
        registry.uri, "models:/drawing@challenger", ["a photo of a ring", "a photo of a heart"], seed=3
    )
    assert pixels(first).shape == pixels(second).shape == (32, 32, 3)
    assert not np.array_equal(pixels(first), pixels(second))


def test_served_image_is_that_of_base_pipeline_with_adapter(registry):
    registry.register("faithful", adapter="adapter_1")
    (served,) = draw(registry.uri, "models:/faithful@challenger", ["a photo of a ring"], seed=7)
    without = registry.draw_directly("a photo of a ring", seed=7)
    registry.pipeline.load_lora_weights(registry.folder / "adapter_1")
    with_adapter = registry.draw_directly("a photo of a ring", seed=7)
    registry.pipeline.unload_lora_weights()
    assert largest_difference(pixels(served), with_adapter) <= 1
    assert largest_difference(pixels(served), without) > 5


def test_callers_parameters_win_over_the_registered_ones(registry):
    registry.register("parameters")
    images = [
        draw(registry.uri, "models:/parameters@challenger", ["a photo of a ring"], **params)[0]
        for params in ({}, {"num_inference_steps": 3}, {"num_inference_steps": 1}, {"guidance_scale": 4.5}, {"seed": 1})
    ]
    assert images[0] == images[1]
    assert len(set(images[1:])) == 4


def test_image_does_not_depend_on_the_prompts_that_come_with_it(registry):
    registry.register("alone")
    (alone,) = draw(registry.uri, "models:/alone@challenger", ["a photo of a ring"])
    together = draw(registry.uri, "models:/alone@challenger", ["a photo of a ring", "a photo of a heart"])
    assert largest_difference(pixels(alone), pixels(together[0])) <= 1


def test_tags_hold_scores_parent_data_and_adapter(registry):
    parent = MlflowTracker(uri=registry.uri, experiment="tests")
    parent.open()
    version = registry.register("tagged", run_id=parent.run_id)
    tags = registry.version("tagged", version.version).tags
    assert tags["geneval/overall"] == "0.5000"
    assert tags["parent_run_id"] == parent.run_id == version.run_id
    assert (tags["git_commit"], tags["prompts_sha256"], tags["smoke_test"]) == ("c0ffee", "d1ce", "passed")
    assert len(tags["adapter_sha256"]) == 64
    assert connect(registry.uri).get_run(parent.run_id).data.metrics["final/geneval/overall"] == 0.5


def test_same_adapter_at_same_commit_is_registered_once(registry):
    first, again = registry.register("once"), registry.register("once")
    assert (first.version, first.created, again.version, again.created) == (1, True, 1, False)


def test_other_adapter_or_other_commit_or_other_evaluation_is_another_version(registry):
    versions = [
        registry.register("several").version,
        registry.register("several", adapter="adapter_1").version,
        registry.register("several", provenance={"git_commit": "other"}).version,
        registry.register("several", provenance={"git_commit": "c0ffee", "evaluation_sha256": "e7a1"}).version,
        registry.register("several", provenance={"git_commit": "c0ffee", "evaluation_sha256": "e7a2"}).version,
    ]
    assert versions == [1, 2, 3, 4, 5]
    assert registry.challenger("several") == 5


def test_adapter_that_changes_nothing_is_not_registered(registry, tmp_path):
    make_tiny_policy().save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"safetensors changes nothing, for its product B A is 0 in every layer"):
        registry.register("nothing", folder=tmp_path)
    assert not connect(registry.uri).search_registered_models("name = 'nothing'")


def test_registering_an_older_adapter_again_gives_it_the_alias_back(registry):
    registry.register("back")
    registry.register("back", adapter="adapter_1")
    registry.register("back")
    assert registry.challenger("back") == 1


def test_parent_run_that_the_store_never_had_gets_one_stand_in(registry):
    first = registry.register("imported", run_id="f" * 32)
    second = registry.register("imported", adapter="adapter_1", run_id="f" * 32)
    assert first.run_id == second.run_id != "f" * 32
    run = connect(registry.uri).get_run(first.run_id)
    assert (run.info.status, run.data.tags["sfgrpo.imported_run_id"]) == ("FINISHED", "f" * 32)
    assert registry.version("imported", 1).tags["parent_run_id"] == "f" * 32


def test_version_that_cannot_draw_is_refused_and_the_alias_stays(registry, monkeypatch):
    registry.register("refused")

    def fail(*arguments: Any, **options: Any) -> list[bytes]:
        raise OSError("no such file")

    monkeypatch.setattr(drawing, "draw", fail)
    with pytest.raises(RegistryError, match=r"models:/refused/2 is registered but cannot draw \(no such file\)"):
        registry.register("refused", adapter="adapter_1")
    assert registry.challenger("refused") == 1
    assert "smoke_test" not in registry.version("refused", 2).tags


def test_version_that_draws_no_png_is_refused(registry, monkeypatch):
    monkeypatch.setattr(drawing, "draw", lambda *arguments, **options: [b"GIF89a.."])
    with pytest.raises(RegistryError, match=r"returned b'GIF89a\.\.' instead of a PNG file"):
        registry.register("gif")


def test_damaged_adapter_is_not_served(registry):
    version = registry.register("damaged")
    model_id = registry.version("damaged", version.version).source.removeprefix("models:/")
    stored = registry.folder / "mlartifacts" / "models" / model_id
    (weights,) = stored.rglob("pytorch_lora_weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(RegistryError, match=r"adapter_0/pytorch_lora_weights.safetensors: expected"):
        registry.register("damaged")


def test_nothing_pickled_is_stored(registry):
    registry.register("plain")
    suffixes = {file.suffix for file in (registry.folder / "mlartifacts" / "models").rglob("*") if file.is_file()}
    assert not suffixes & {".pkl", ".bin", ".pt", ".pth"}


def test_branch_of_a_scheduled_run_is_a_tag_of_version_and_run(registry):
    named = {"git_commit": "c0ffee", "prompts_sha256": "d1ce", "run_branch": "runs/calm-owl", "run_commit": "beef"}
    version = registry.register("branched", provenance=named)
    run = connect(registry.uri).get_run(version.run_id)
    for tags in (registry.version("branched", version.version).tags, run.data.tags):
        assert (tags["run_branch"], tags["run_commit"]) == ("runs/calm-owl", "beef")
