"""Checkpoints for exact resume of a training; safetensors and JSON only."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sfgrpo.checkpoint.format import FORMAT, require_format
from sfgrpo.errors import IntegrityError
from sfgrpo.runtime.files import atomic_directory, remove_directory
from sfgrpo.runtime.manifest import verify_manifest, write_manifest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingState:
    """State of a training between two updates. Tensors come back bit for bit, on the CPU."""

    update_index: int
    """Updates done, which is also the index of the next one."""
    adapter: Mapping[str, Tensor]
    """Trained parameters by name."""
    ema: Mapping[str, Any]
    """State of the moving average."""
    optimizer: Mapping[str, Any]
    """`state_dict` of the optimiser: nested dicts, lists and tuples of tensors and JSON values."""
    rng: Mapping[str, Tensor | int]
    """States of torch generators, as uint8 tensors, and seeds."""
    scaler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`state_dict` of the gradient scaler; empty without one."""
    best: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Files of the best adapter so far, by name, as uint8 tensors."""
    config: Mapping[str, Any]
    """Configuration of the run, flat."""
    history: Sequence[Mapping[str, Any]]
    """Metrics of every update so far, oldest first."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON values, such as the evaluations so far."""


CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints, below that of the run."""
FILES = ("adapter.safetensors", "state.safetensors", "state.json", "history.jsonl")


def checkpoint_path(root: Path, update_index: int) -> Path:
    """Return the path of the checkpoint after `update_index` updates."""
    return root / f"update-{update_index:06d}"


def save_checkpoint(root: Path, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint below `root`, then remove all but the `keep` newest up to it.

    Raises `OSError` when it cannot be written, such as on a full disk; earlier checkpoints are untouched then.
    """
    path = checkpoint_path(root, state.update_index)
    contents = _to_files(state)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_directory(path) as partial:
            for name, content in contents.items():
                (partial / name).write_bytes(content)
            write_manifest(partial)
    except OSError as error:
        size, free = sum(map(len, contents.values())) / 1e6, shutil.disk_usage(root).free / 1e6
        raise OSError(
            error.errno,
            f"checkpoint {path} of {size:.1f} MB could not be written ({error.strerror}; {free:.1f} MB are free); "
            "earlier checkpoints are untouched, so make room and start again to resume from the latest",
        ) from error
    up_to_it = sorted(saved for saved in saved_updates(root) if saved <= state.update_index)
    for saved in up_to_it[:-keep]:
        remove_directory(checkpoint_path(root, saved))
    return path


def load_checkpoint(path: Path) -> TrainingState:
    """Load a checkpoint; raise as `read_checkpoint` does."""
    return state_of(read_checkpoint(path))


def read_checkpoint(path: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint, by name.

    Raises:
        IntegrityError: a file is not as it was written.
        ConfigError: another version wrote them, in a format that this one does not read.
    """
    verify_manifest(path)
    require_format(json.loads((path / "state.json").read_bytes()).get("format"), path)
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name in FILES}


def state_of(files: Mapping[str, bytes]) -> TrainingState:
    """Return the state in the files that `read_checkpoint` returned, here or in another process."""
    tensors = safetensors.torch.load(files["state.safetensors"])
    values = json.loads(files["state.json"])
    del values["format"]
    lines = files["history.jsonl"].decode().splitlines()
    return TrainingState(
        adapter=safetensors.torch.load(files["adapter.safetensors"]),
        history=tuple(json.loads(line) for line in lines),
        **{name: _joined(value, tensors) for name, value in values.items()},
    )


def update_of(path: Path) -> int:
    """Return after how many updates a checkpoint was taken, by its name."""
    return int(path.name.removeprefix("update-"))


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest intact checkpoint below `root`, or None; warn of newer ones that are damaged.

    Raises the newest one's `IntegrityError` when there are checkpoints and all are damaged: starting over silently
    would throw the run away.
    """
    errors: list[IntegrityError] = []
    for update_index in sorted(saved_updates(root), reverse=True):
        path = checkpoint_path(root, update_index)
        try:
            verify_manifest(path)
        except IntegrityError as error:
            logger.warning("checkpoint %s is skipped: %s", path.name, error)
            errors.append(error)
        else:
            return path
    if errors:
        raise errors[0]
    return None


def _to_files(state: TrainingState) -> dict[str, bytes]:
    values: dict[str, Any] = {"format": FORMAT}
    tensors: dict[str, Tensor] = {}
    for name in ("update_index", "ema", "optimizer", "rng", "scaler", "best", "config", "extra"):
        values[name] = _split(getattr(state, name), name, tensors)
    history = "".join(json.dumps(metrics) + "\n" for metrics in state.history)
    return {
        "adapter.safetensors": _to_bytes(state.adapter),
        "state.safetensors": _to_bytes(tensors),
        "state.json": json.dumps(values, indent=1).encode(),
        "history.jsonl": history.encode(),
    }


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies, because safetensors refuses tensors that share their memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies)


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested value to `tensors`, and mark what JSON lacks: tuples, keys of any type."""
    if isinstance(value, Tensor):
        assert name not in tensors, f"two tensors of a training state are called {name}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_split`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _joined(item, tensors) for key, item in content}
    items = [_joined(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def saved_updates(root: Path) -> list[int]:
    """Return the updates that have a checkpoint below `root`, damaged or not."""
    names = (path.name.removeprefix("update-") for path in root.glob("update-*"))
    return [int(name) for name in names if name.isdecimal()]
