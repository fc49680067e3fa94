"""Checkpoints of a training run: all that is needed to go on as if nothing had happened, without pickle."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sfgrpo.errors import IntegrityError
from sfgrpo.runtime.files import atomic_directory, remove_directory
from sfgrpo.runtime.manifest import verify_manifest, write_manifest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingState:
    """Where a training run stands between two updates. Tensors come back bit for bit, on the CPU."""

    update_index: int
    """Updates done, which is also the index of the next one."""
    adapter: Mapping[str, Tensor]
    """Trained parameters by name."""
    ema: Mapping[str, Tensor]
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
    """JSON values of the trainer's own: the tracked run, the best evaluation."""


CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints, below that of the run."""
FILES = ("adapter.safetensors", "state.safetensors", "state.json", "history.jsonl")


def checkpoint_path(root: Path, update_index: int) -> Path:
    """Names the checkpoint taken after `update_index` updates."""
    return root / f"update-{update_index:06d}"


def save_checkpoint(root: Path, state: TrainingState, keep: int, protected: Collection[int] = ()) -> Path:
    """Writes a checkpoint below `root`, then removes all but the `keep` newest and those of `protected` updates.

    Raises `OSError` when it cannot be written, the disk being full, say; no earlier checkpoint is touched then.
    """
    if keep < 1:
        raise ValueError(f"keep {keep} would remove the checkpoint just written; keep at least 1")
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
    _prune(root, state.update_index, keep, protected)
    return path


def load_checkpoint(path: Path) -> TrainingState:
    """Reads a checkpoint; raises `IntegrityError` unless every file is the one that was written."""
    return state_of(read_checkpoint(path))


def read_checkpoint(path: Path) -> dict[str, bytes]:
    """Reads the files of a checkpoint, by name; raises `IntegrityError` unless every file is as it was written."""
    verify_manifest(path)
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name in FILES}


def state_of(files: Mapping[str, bytes]) -> TrainingState:
    """Makes the state of what `read_checkpoint` gave, here or in another process."""
    tensors = safetensors.torch.load(files["state.safetensors"])
    values = json.loads(files["state.json"])
    lines = files["history.jsonl"].decode().splitlines()
    return TrainingState(
        adapter=safetensors.torch.load(files["adapter.safetensors"]),
        history=tuple(json.loads(line) for line in lines),
        **{name: _joined(value, tensors) for name, value in values.items()},
    )


def update_of(path: Path) -> int:
    """Tells after how many updates a checkpoint was taken, by its name."""
    return int(path.name.removeprefix("update-"))


def latest_checkpoint(root: Path) -> Path | None:
    """Finds the newest intact checkpoint below `root`, warning of newer ones that are damaged; None without any.

    Raises the newest one's `IntegrityError` when there are checkpoints and all are damaged: to start over silently
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
    values: dict[str, Any] = {}
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
    """Moves the tensors of a nested value to `tensors`, and marks what JSON does not know: tuples, keys of any type."""
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
    """Undoes `_split`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _joined(item, tensors) for key, item in content}
    items = [_joined(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _prune(root: Path, update_index: int, keep: int, protected: Collection[int]) -> None:
    older = sorted(saved for saved in saved_updates(root) if saved < update_index)
    for saved in older[: max(0, len(older) - (keep - 1))]:
        if saved not in protected:
            remove_directory(checkpoint_path(root, saved))


def saved_updates(root: Path) -> list[int]:
    """Return the updates that have a checkpoint below `root`, damaged or not."""
    names = (path.name.removeprefix("update-") for path in root.glob("update-*"))
    return [int(name) for name in names if name.isdecimal()]
