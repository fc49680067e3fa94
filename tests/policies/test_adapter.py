"""The file of an adapter: what is read from it, and every way in which it can be unusable."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfgrpo.config.schema import PolicyConfig
from sfgrpo.errors import AdapterError, ConfigError
from sfgrpo.factory import base_of, policy_of
from sfgrpo.policies.adapter import WEIGHTS_NAME, Base, read_adapter, read_effective_adapter
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.runtime.manifest import model_digest, sha256_of_file
from tests.support.tiny import LORA_TARGETS, build_tiny_adapter, disturb, make_tiny_pipeline, make_tiny_policy

HERE, THERE = Base(name="models/tiny", revision="sha256:aa"), Base(name="models/other", revision="sha256:bb")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEY = "lora_adapter_metadata"
LAYER = "transformer.transformer_blocks.0.attn.to_q"

Content = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, policy = tmp_path_factory.mktemp("adapter"), make_tiny_policy(base=HERE)
    disturb(policy)
    policy.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def policy() -> SD3Policy:
    return make_tiny_policy()


def read(saved: Path) -> Content:
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as file:
        return load_file(saved / WEIGHTS_NAME), json.loads(file.metadata()[KEY])


def config(**changes: Any) -> PolicyConfig:
    values: dict[str, Any] = {
        "pretrained": "models/tiny",
        "dtype": "float32",
        "resolution": 32,
        "max_sequence_length": 0,
        "lora_rank": 2,
        "lora_alpha": 4,
        "lora_targets": LORA_TARGETS,
    }
    return PolicyConfig(**values | changes)


def test_file_says_what_it_was_trained_with_and_on(saved):
    adapter = read_adapter(saved)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (2, 4, tuple(sorted(LORA_TARGETS)))
    assert (adapter.base, adapter.changes_nothing) == (HERE, False)
    assert adapter.sha256 == sha256_of_file(saved / WEIGHTS_NAME)
    assert adapter.weights.keys() == load_file(saved / WEIGHTS_NAME).keys()


def test_file_of_plain_diffusers_names_no_base(tmp_path):
    adapter = read_adapter(build_tiny_adapter(make_tiny_pipeline(), tmp_path))
    assert (adapter.rank, adapter.alpha, adapter.base) == (2, 4, None)


def test_plain_diffusers_takes_alpha_from_a_file_that_names_its_base(saved):
    pipeline = make_tiny_pipeline()
    pipeline.load_lora_weights(saved)
    (loaded,) = pipeline.transformer.peft_config.values()
    assert (loaded.r, loaded.lora_alpha) == (2, 4)


def with_weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        change(content[0])

    return edit


def with_settings(**changes: Any) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        content[1].update({f"transformer.{name}": value for name, value in changes.items()})

    return edit


def set_to(number: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[f"{LAYER}.lora_B.weight"][0, 0] = number

    return edit


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if name in key]:
            del weights[key]

    return edit


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.ones(shape)

    return edit


EDITED = {
    "nan": (with_weights(set_to(math.nan)), r"NaN or infinite weights in 1 of \d+ tensors, first .*to_q.lora_B"),
    "inf": (with_weights(set_to(-math.inf)), "NaN or infinite weights"),
    "lacks A": (with_weights(drop("0.attn.to_q.lora_A")), "has the tensor .*lora_B.weight and lacks .*lora_A.weight"),
    "lacks B": (with_weights(drop("0.attn.to_q.lora_B")), "has the tensor .*lora_A.weight and lacks .*lora_B.weight"),
    "lacks a target": (with_weights(drop("to_k")), "has no weights for its targets to_k"),
    "lacks all": (with_weights(drop("")), "has no weights for its targets"),
    "of another layer": (with_weights(add("transformer.x.ff.lora_A.weight", 2, 4)), "targets .* do not explain"),
    "of another model": (with_weights(add("unet.to_q.lora_A.weight", 2, 4)), "do not explain"),
    "not LoRA": (with_weights(add(f"{LAYER}.dora_scale", 4)), "do not explain"),
    "rank of A": (with_weights(add(f"{LAYER}.lora_A.weight", 3, 16)), r"shape \[3, 16\], which is not of its rank 2"),
    "rank of B": (with_weights(add(f"{LAYER}.lora_B.weight", 16, 3)), r"shape \[16, 3\], which is not of its rank 2"),
    "one axis": (with_weights(add(f"{LAYER}.lora_A.weight", 2)), r"shape \[2\], which is not of its rank 2"),
    "other rank": (with_settings(r=3), "is not of its rank 3"),
    "rank 0": (with_settings(r=0), "r is 0 instead of a positive integer"),
    "rank text": (with_settings(r="2"), "r is '2' instead of a positive integer"),
    "no alpha": (with_settings(lora_alpha=None), "lora_alpha is None instead of a positive integer"),
    "alpha 0": (with_settings(lora_alpha=0), "lora_alpha is 0 instead of a positive integer"),
    "alpha nan": (with_settings(lora_alpha=math.nan), "lora_alpha is nan instead of a positive integer"),
    "targets pattern": (with_settings(target_modules=".*"), r"target_modules is '\.\*' instead of a list"),
    "no targets": (with_settings(target_modules=[]), r"target_modules is \[\] instead of a list"),
    "dora": (with_settings(use_dora=True), "is no plain LoRA: its use_dora is True"),
    "rslora": (with_settings(use_rslora=True), "is no plain LoRA: its use_rslora is True"),
    "alphas": (with_settings(alpha_pattern={"to_q": 8}), "is no plain LoRA: its alpha_pattern"),
    "ranks": (with_settings(rank_pattern={"to_q": 8}), "is no plain LoRA: its rank_pattern"),
    "bias": (with_settings(bias="all"), "is no plain LoRA: its bias"),
}
"""Edits of an intact adapter, each with the complaint."""


@pytest.mark.parametrize("edit", EDITED)
def test_adapter_that_is_not_what_it_says_is_refused(saved, policy, tmp_path, edit):
    change, complaint = EDITED[edit]
    weights, settings = read(saved)
    change((weights, settings))
    save_file(weights, tmp_path / WEIGHTS_NAME, {KEY: json.dumps(settings)})
    with pytest.raises(AdapterError, match=complaint) as raised:
        read_adapter(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / WEIGHTS_NAME)), "the file is named"
    assert str(raised.value).endswith("`python -m sfgrpo train` writes an intact one")
    with pytest.raises(AdapterError, match=complaint):
        policy.load_adapter(tmp_path)


@pytest.mark.parametrize("metadata", [None, {}, {KEY: "no JSON"}, {KEY: "[]"}, {KEY: "{}"}, {"format": "pt"}])
def test_adapter_without_metadata_is_refused(saved, tmp_path, metadata):
    save_file(read(saved)[0], tmp_path / WEIGHTS_NAME, metadata)
    with pytest.raises(AdapterError, match=r"has no metadata lora_adapter_metadata|instead of a list of layers"):
        read_adapter(tmp_path)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", r"is truncated: it has 0 bytes"),
    "in the length": (lambda content: content[:7], r"is truncated: it has 7 bytes"),
    "in the header": (lambda content: content[:100], r"is truncated: it has 100 bytes, and its header needs \d+"),
    "in the weights": (lambda content: content[:-1], r"is truncated: it has \d+ of \d+ bytes"),
    "longer": (lambda content: content + b"\0", "is not a safetensors file"),
    "pickle": (lambda content: pickle.dumps({"a": 1}), "is not a safetensors file"),
    "text": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "is not a safetensors file"),
    "zeros": (lambda content: bytes(len(content)), "is not a safetensors file"),
    "broken header": (lambda content: content[:8] + b"[" + content[9:], "is not a safetensors file"),
    "list": (lambda content: (2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
}
"""What happens to files, each with the complaint."""


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused(saved, tmp_path, damage):
    change, complaint = DAMAGED[damage]
    (tmp_path / WEIGHTS_NAME).write_bytes(change((saved / WEIGHTS_NAME).read_bytes()))
    with pytest.raises(AdapterError, match=complaint):
        read_adapter(tmp_path)


def test_absent_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=f"{WEIGHTS_NAME} does not exist; restore it"):
        read_adapter(tmp_path / "absent", "restore it")
    (tmp_path / WEIGHTS_NAME).mkdir()
    with pytest.raises(AdapterError, match=re.escape(f"cannot be read ({os.strerror(21)})")):
        read_adapter(tmp_path)


ZERO: dict[str, Callable[[str, Tensor], Tensor]] = {
    "B": lambda name, weight: torch.zeros_like(weight) if "lora_B" in name else weight,
    "A": lambda name, weight: torch.zeros_like(weight) if "lora_A" in name else weight,
    "minus zero": lambda name, weight: -torch.zeros_like(weight),
    "what the other does not meet": lambda name, weight: (
        weight * (torch.tensor([[1.0], [0.0]]) if "lora_A" in name else torch.tensor([[0.0, 1.0]]))
    ),
}


@pytest.mark.parametrize("zero", ZERO)
def test_adapter_whose_product_is_zero_changes_nothing(saved, tmp_path, zero):
    weights, settings = read(saved)
    changed = {name: ZERO[zero](name, weight) for name, weight in weights.items()}
    save_file(changed, tmp_path / WEIGHTS_NAME, {KEY: json.dumps(settings)})
    assert read_adapter(tmp_path).changes_nothing
    with pytest.raises(AdapterError, match=r"changes nothing, for its product B A is 0 in every layer"):
        read_effective_adapter(tmp_path)


def test_one_weight_is_a_change(saved, tmp_path):
    weights, settings = read(saved)
    changed = {name: ZERO["B"](name, weight) for name, weight in weights.items()}
    set_to(1e-6)(changed)
    save_file(changed, tmp_path / WEIGHTS_NAME, {KEY: json.dumps(settings)})
    assert read_effective_adapter(tmp_path).rank == 2


def test_untrained_adapter_changes_nothing(tmp_path):
    make_tiny_policy().save_adapter(tmp_path)
    assert read_adapter(tmp_path).changes_nothing


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora_alpha": 800}, "was trained with 4 and the policy has 800; set policy.lora_alpha to 4"),
        ({"lora_rank": 3}, "was trained with 2 and the policy has 3; set policy.lora_rank to 2"),
        ({"lora_targets": ("to_q",)}, r"the policy has \['to_q'\]; set policy.lora_targets to \['to_k', "),
        ({"base": THERE}, r"was trained on models/tiny \(sha256:aa\) and the base model is models/other \(sha256:bb\)"),
    ],
)
def test_policy_of_other_settings_does_not_load_it(saved, changes, complaint):
    policy = make_tiny_policy(**changes)
    before = {name: weight.clone() for name, weight in policy.adapter_parameters().items()}
    with pytest.raises(AdapterError, match=complaint):
        policy.load_adapter(saved)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.adapter_parameters().items())


def test_what_the_file_knows_wins_over_the_parameters_and_is_logged(saved, caplog):
    adapter = read_adapter(saved)
    assert policy_of(adapter, config()) == config(lora_targets=tuple(sorted(LORA_TARGETS)))
    assert not caplog.text, "another order of the targets is no difference"
    known = policy_of(adapter, config(lora_alpha=800, lora_rank=7, lora_targets=("to_q",), dtype="bfloat16"))
    assert (known.lora_alpha, known.lora_rank, known.lora_targets) == (4, 2, tuple(sorted(LORA_TARGETS)))
    assert known.dtype == "bfloat16", "the file does not know the dtype of the base"
    assert "policy.lora_alpha is 800, but the adapter was trained with 4, which is used" in caplog.text


def test_commit_of_a_hub_model_comes_from_the_file(tmp_path):
    make_tiny_policy(base=Base(name="org/model", revision=COMMIT)).save_adapter(tmp_path)
    known = policy_of(read_adapter(tmp_path), config(pretrained="org/model", revision="main"))
    assert base_of(known) == Base(name="org/model", revision=COMMIT)


def make_model(folder: Path) -> None:
    files = {"model_index.json": "{}", "a/model.safetensors": "A", "b/model.safetensors": "B", "b/vocab.txt": "v"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: (folder / "a/model.safetensors").write_text("C"),
    "swapped weights": lambda folder: [
        (folder / f"{name}/model.safetensors").write_text(text) for name, text in (("a", "B"), ("b", "A"))
    ],
    "configuration": lambda folder: (folder / "model_index.json").write_text("{ }"),
    "vocabulary": lambda folder: (folder / "b/vocab.txt").write_text("w"),
    "one more file": lambda folder: (folder / "b/config.json").write_text("{}"),
    "one file less": lambda folder: (folder / "b/vocab.txt").unlink(),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "card": lambda folder: (folder / "README.md").write_text("# Model"),
    "manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "cache of the hub": lambda folder: make_model(folder / ".cache"),
    "another place": lambda folder: None,
}


@pytest.mark.parametrize("change", [*CHANGES, *NO_CHANGES])
def test_base_is_identified_by_all_that_shapes_it_wherever_it_is(tmp_path, change):
    make_model(tmp_path / "one")
    make_model(tmp_path / "two")
    (CHANGES | NO_CHANGES)[change](tmp_path / "two")
    one, two = (base_of(config(pretrained=str(tmp_path / name))) for name in ("one", "two"))
    assert one.is_folder and two.is_folder
    assert (one.revision == two.revision) == (change in NO_CHANGES)


def test_linked_component_belongs_to_the_base(tmp_path):
    make_model(tmp_path / "model")
    before = model_digest(tmp_path / "model")
    (tmp_path / "model/a").rename(tmp_path / "elsewhere")
    (tmp_path / "model/a").symlink_to(tmp_path / "elsewhere")
    assert model_digest(tmp_path / "model") == before
    (tmp_path / "elsewhere/model.safetensors").write_text("other")
    assert model_digest(tmp_path / "model") != before


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_branch_of_the_hub_is_resolved_to_a_commit_offline_by_the_cache(hub_cache):
    model = hub_cache / "models--org--model"
    make_model(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    assert base_of(config(pretrained="org/model", revision="main")) == Base(name="org/model", revision=COMMIT)


@pytest.mark.parametrize("name", ["org/absent", "no such name/at all/anywhere"])
def test_hub_model_that_is_nowhere_is_a_wrong_parameter(hub_cache, name):
    with pytest.raises(ConfigError, match=r"policy.pretrained: .* at revision main is neither in the hub's cache nor"):
        base_of(config(pretrained=name, revision="main"))


def test_commit_of_the_hub_needs_no_look_up(hub_cache):
    assert base_of(config(pretrained="org/model", revision=COMMIT)).revision == COMMIT
