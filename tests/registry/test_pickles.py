"""No file that this package reads can run code: a pickle is refused or ignored wherever weights are expected."""

from __future__ import annotations

import ast
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfgrpo.checkpoint.state import TrainingState, load_checkpoint, save_checkpoint
from sfgrpo.config.pretrain_schema import TransformerConfig
from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import RegistryError
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.pretraining.flow import FlowTraining
from sfgrpo.registry.register import TrainedAdapter, register_version
from sfgrpo.rewards import build_reward
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.study.results import _read_samples
from tests.support.registry import draw
from tests.support.tiny import (
    build_tiny_adapter,
    build_tiny_pipeline,
    make_tiny_pipeline,
    make_tiny_policy,
    tiny_serving,
)
from tests.support.tiny_run import ROOT

# Not ours to mend: deprecations and advice of diffusers, SQLAlchemy and MLflow.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

SAFETENSORS = ".safetensors"
PICKLED_NAMES = ("{stem}.bin", "{stem}.pt", "{stem}.ckpt", "pytorch_model.bin", "diffusion_pytorch_model.bin")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.canary), "w")


def plain_pickle(canary: Path) -> bytes:
    return pickle.dumps({"weight": Payload(canary)})


def torch_file(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Payload(canary)}, buffer)
    return buffer.getvalue()


PICKLES = (plain_pickle, torch_file)


def load_pipeline(folder: Path) -> None:
    options = {"resolution": 32, "max_sequence_length": 0, "lora_rank": 2, "lora_alpha": 4, "lora_targets": ("to_q",)}
    SD3Policy.from_pretrained(folder, **options)


def load_adapter(folder: Path) -> None:
    make_tiny_policy(lora_rank=2, lora_alpha=4, lora_targets=("to_q", "to_k", "to_v", "to_out.0")).load_adapter(folder)


def load_reward(folder: Path) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    build_reward("clip", pretrained=str(folder))


def load_saved(folder: Path) -> None:
    # An attacker who can plant a pickle can write the manifest as well.
    write_manifest(folder)
    load_checkpoint(folder)


def flow_training() -> FlowTraining:
    config = TransformerConfig(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        shift=1.0,
        num_steps=2,
        batch_size=2,
        learning_rate=1e-3,
        muon_learning_rate=1e-2,
        decay_fraction=0.5,
        warmup_steps=1,
        ema_decay=0.9,
        caption_dropout=0.1,
        padded_every_num_steps=4,
        bfloat16=False,
        compile=False,
    )
    return FlowTraining(make_tiny_pipeline(), config)


def load_flow(folder: Path) -> None:
    flow_training().load(folder / "flow.safetensors")


def make_checkpoint(folder: Path) -> None:
    tensors = {"lora": torch.zeros(2)}
    state = TrainingState(
        update_index=1, adapter=tensors, ema=tensors, optimizer={}, rng={}, config={}, history=(), best=tensors
    )
    save_checkpoint(folder.parent, state, keep=1).rename(folder)


def make_adapter(folder: Path) -> None:
    build_tiny_adapter(make_tiny_pipeline(), folder)


def make_flow(folder: Path) -> None:
    folder.mkdir()
    flow_training().save(folder / "flow.safetensors")


def copy_reward(folder: Path) -> None:
    shutil.copytree(ROOT / "models/shapes-clip", folder)


LOADERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], None]]] = {
    "base model": (build_tiny_pipeline, load_pipeline),
    "adapter": (make_adapter, load_adapter),
    "reward model": (copy_reward, load_reward),
    "checkpoint": (make_checkpoint, load_saved),
    "state of pretraining": (make_flow, load_flow),
}
"""What makes a folder of each kind that is read, and what reads it."""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "the payload has run"


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{SAFETENSORS}"))


@pytest.mark.parametrize("pickled", PICKLES)
def test_payload_would_run_if_it_were_unpickled(canary, pickled):
    content = pickled(canary)
    if pickled is plain_pickle:
        pickle.loads(content)["weight"].close()
    else:
        torch.load(io.BytesIO(content), weights_only=False)["weight"].close()
    assert canary.exists()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("pickled", PICKLES)
def test_pickle_that_is_called_safetensors_is_refused(tmp_path, canary, kind, pickled):
    make, load = LOADERS[kind]
    make(tmp_path / "folder")
    load(tmp_path / "folder")
    for path in weights_of(tmp_path / "folder"):
        whole = path.read_bytes()
        path.write_bytes(pickled(canary))
        if "encoder_3" not in str(path):  # without T5 it is not even read
            with pytest.raises(Exception, match=r"(?i)header|safetensors|deserializ"):
                load(tmp_path / "folder")
        assert not canary.exists()
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("pickled", PICKLES)
def test_pickle_does_not_replace_absent_weights(tmp_path, canary, kind, pickled):
    make, load = LOADERS[kind]
    make(tmp_path / "folder")
    for path in weights_of(tmp_path / "folder"):
        whole = path.read_bytes()
        path.unlink()
        planted = {path.with_name(name.format(stem=path.stem)) for name in PICKLED_NAMES}
        for other in planted:
            other.write_bytes(pickled(canary))
        if "encoder_3" not in str(path):
            with pytest.raises(Exception, match=path.stem.partition(".")[0]):
                load(tmp_path / "folder")
        assert not canary.exists()
        for other in planted:
            other.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("pickled", PICKLES)
def test_pickle_beside_the_weights_is_ignored(tmp_path, canary, kind, pickled):
    make, load = LOADERS[kind]
    make(tmp_path / "folder")
    for path in weights_of(tmp_path / "folder"):
        for name in PICKLED_NAMES:
            path.with_name(name.format(stem=path.stem)).write_bytes(pickled(canary))
    load(tmp_path / "folder")
    assert not canary.exists()


def test_arrays_with_pickled_objects_are_refused(tmp_path, canary):
    objects = np.array([Payload(canary)], dtype=object)
    names = ("texts", "before", "after", "correct_before", "correct_after")
    np.savez(tmp_path / "samples.npz", **dict.fromkeys(names, objects))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        _read_samples(tmp_path / "samples.npz")
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("pickled", PICKLES)
def test_registered_version_holds_no_pickle_and_runs_none(tmp_path, canary, pickled):
    build_tiny_pipeline(tmp_path / "pipeline")
    build_tiny_adapter(make_tiny_pipeline(), tmp_path / "adapter")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    register_version(
        uri=uri,
        experiment="tests",
        registry=RegistryConfig(model_name="tiny", alias="challenger"),
        adapter=TrainedAdapter(
            folder=tmp_path / "adapter", metrics={}, provenance={"git_commit": "c0ffee"}, run_id=None
        ),
        serving=tiny_serving(tmp_path / "pipeline", num_inference_steps=1),
        scratch=tmp_path / "scratch",
    )
    (model,) = (path.parent for path in (tmp_path / "mlartifacts").rglob("MLmodel"))
    files = [path for path in model.rglob("*") if path.is_file()]
    assert not [path for path in files if is_pickle(path.read_bytes())]
    for path in [path for path in files if path.suffix == SAFETENSORS and "encoder_3" not in str(path)]:
        whole = path.read_bytes()
        planted = {path.with_name(name.format(stem=path.stem)) for name in PICKLED_NAMES}
        for other in planted:
            other.write_bytes(pickled(canary))
        path.unlink()
        with pytest.raises(RegistryError, match=path.stem.partition(".")[0]):
            draw(uri, "models:/tiny@challenger", ["a photo of a ring"])
        for other in planted:
            other.unlink()
        path.write_bytes(whole)
        assert not canary.exists()
    assert draw(uri, "models:/tiny@challenger", ["a photo of a ring"])
    assert not canary.exists()


def is_pickle(content: bytes) -> bool:
    """Return whether this is a pickle of protocol 2 or later, or a zip file, such as those of torch.save."""
    return content[:1] == b"\x80" or content[:4] == b"PK\x03\x04"


@pytest.mark.parametrize("pickled", PICKLES)
def test_pickles_are_known_by_their_first_bytes(canary, pickled):
    assert is_pickle(pickled(canary))


FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
NEED: dict[str, tuple[str, str]] = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "lora_state_dict": ("use_safetensors", "True"),
    "load_lora_weights": ("use_safetensors", "True"),
    "from_pretrained": ("use_safetensors", "True"),
}
"""Functions, by whole name, and methods that read weights, with the argument without which they might unpickle."""
WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "ImageProcessorPil", "SD3Policy", "ClipReward")
"""Ends of the names of classes whose `from_pretrained` reads text alone, or is ours."""


def dangers(source: str) -> Iterator[str]:
    """Yield the lines of a module that could unpickle what they read."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in FORBIDDEN:
                yield f"line {node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if "True" in (given.get("allow_pickle"), given.get("trust_remote_code")):
                yield f"line {node.lineno} lets {called} run what it reads"
            owner, _, method = called.rpartition(".")
            argument, value = NEED.get(called) or NEED.get(method, (None, None))
            if argument and given.get(argument) != value and not owner.endswith(WITHOUT_WEIGHTS):
                yield f"line {node.lineno} calls {called} without {argument}={value}"


MODULES = sorted(
    path for folder in ("sfgrpo", "tasks", "flows", "benchmarks", "infra") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_unpickle(path):
    assert not list(dangers(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "read(path, allow_pickle=True)",
        "CLIPModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "StableDiffusion3Pipeline.lora_state_dict(path)",
    ],
)
def test_dangerous_lines_are_found(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "CLIPTokenizer.from_pretrained(path)",
        "SD3Policy.from_pretrained(path)",
        "json.load(file)",
        "safetensors.torch.load(content)",
    ],
)
def test_harmless_lines_are_let_through(source):
    assert not list(dangers(source))
