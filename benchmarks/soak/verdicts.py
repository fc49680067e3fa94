"""Compares a disturbed training with an undisturbed one, and with its records on the servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.soak.training import MARK, processes_where
from sfgrpo.checkpoint.state import CHECKPOINTS, TrainingState, latest_checkpoint, load_checkpoint
from sfgrpo.runtime.files import PARTIAL_SUFFIX
from sfgrpo.storage.restore import restore_run
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking.mlflow_client import connect

MACHINE = ("time/", "memory/")
"""Prefixes of metrics that depend on the machine."""
GONE_S = 10.0
Verdict = tuple[str, str]
"""What must hold, and the complaint if it does not; empty if it does."""


def verdicts(undisturbed: Path, disturbed: Path, uri: str, mirror: str, num_updates: int) -> Iterator[Verdict]:
    """Compare everything that a training leaves behind."""
    (expected_folder,), (folder,) = (list(path.glob(".scratch/train-*")) for path in (undisturbed, disturbed))
    yield "same work", _unless(folder.name == expected_folder.name, "the run keys differ")
    expected, state = _final(expected_folder), _final(folder)
    yield f"all {num_updates} updates done", _unless(state.update_index == num_updates, f"{state.update_index}")
    last = f"{CHECKPOINTS}/update-{num_updates:06d}/adapter.safetensors"
    yield "final adapter, byte for byte", _unless(_same_files(expected_folder, folder, last), "it differs")
    # Without `rng`: torch seeds its own generator at random, and nothing draws from it.
    for name in ("adapter", "ema", "optimizer", "scaler", "best"):
        same = _same(getattr(expected, name), getattr(state, name))
        yield f"final checkpoint: {name}, bit for bit", _unless(same, "it differs")
    yield (
        "published adapter, byte for byte",
        _unless(_same_files(undisturbed, disturbed, "models/policy/adapter"), "it differs"),
    )
    histories = ([_without_machine(entry) for entry in each.history] for each in (expected, state))
    yield "history, but for times and memory", _unless(_same(*histories), "it differs")
    judged = ([_without_machine(each["metrics"]) for each in one.extra["evaluations"]] for one in (expected, state))
    yield "evaluations, but for times and memory", _unless(_same(*judged), "it differs")
    yield from _recorded(disturbed, state, uri)
    yield from _mirrored(disturbed.parent / "restored", folder, mirror)
    left = [str(path) for path in disturbed.rglob(f"*{PARTIAL_SUFFIX}")]
    yield "no partial files left", ", ".join(left)


def no_process_left(folder: Path) -> Verdict:
    """Check that no process of the soak in this folder is left."""
    deadline = time.monotonic() + GONE_S
    while (left := processes_where(**{MARK: str(folder)})) and time.monotonic() < deadline:
        time.sleep(0.2)
    return "no process left", ", ".join(map(str, left))


def _recorded(disturbed: Path, state: TrainingState, uri: str) -> Iterator[Verdict]:
    """Compare the record in MLflow with the final checkpoint."""
    client = connect(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    yield "MLflow: one run", _unless(len(runs) == 1, f"there are {len(runs)}")
    record = json.loads((disturbed / "models/policy/training.json").read_text(encoding="utf-8"))
    run = next(run for run in runs if run.info.run_id == record["mlflow_run_id"])
    yield "MLflow: status FINISHED", _unless(run.info.status == "FINISHED", run.info.status)
    entries = [(entry["update"], entry) for entry in state.history]
    entries += [(evaluation["update"], evaluation["metrics"]) for evaluation in state.extra["evaluations"]]
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, entry in entries:
        for key in entry.keys() - {"update"}:
            expected.setdefault(key, []).append((step, entry[key]))
    wrong = []
    for key in sorted(expected.keys() | run.data.metrics.keys()):
        logged = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        steps = sorted(step for step, _ in logged)
        if key not in expected:
            # Times of evaluations are not in the checkpoint, so a process that is killed may take them along.
            twice = len(set(steps)) < len(steps)
            wrong += [f"{key} has steps twice"] if twice else []
        elif steps != [step for step, _ in expected[key]]:
            wrong.append(f"{key} has the steps {steps}")
        elif not key.startswith(MACHINE) and str(sorted(logged)) != str(expected[key]):
            wrong.append(f"{key} has other values")
    yield f"MLflow: every step of {len(expected)} metrics once, with its value", "; ".join(wrong)
    names = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    wrong = []
    for evaluation in state.extra["evaluations"]:
        own = [name for name in names if name.startswith(f"samples+step+{evaluation['update']}+")]
        if sorted(name.rpartition(".")[2] for name in own) != ["png", "webp"]:
            wrong.append(f"update {evaluation['update']} has {own}")
    yield f"MLflow: samples of {len(state.extra['evaluations'])} evaluations once", "; ".join(wrong)


def _mirrored(empty: Path, folder: Path, mirror: str) -> Iterator[Verdict]:
    """Restore the run from the bucket, compare it, and check that nothing else is there."""
    restored = empty / folder.name
    restored.mkdir(parents=True)
    restore_run(mirror, restored)
    newest, other = latest_checkpoint(folder / CHECKPOINTS), latest_checkpoint(restored / CHECKPOINTS)
    same = newest is not None and other is not None and newest.name == other.name and _same_files(newest, other, "")
    yield "S3: final checkpoint restored, byte for byte", _unless(same, f"{newest} and {other} differ")
    local = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    objects = Bucket(f"{mirror}/{folder.name}").sizes()
    difference = sorted(name for name in local.keys() | objects.keys() if local.get(name) != objects.get(name))
    yield f"S3: the run's {len(local)} files and nothing else", ", ".join(difference)


def _final(folder: Path) -> TrainingState:
    path = latest_checkpoint(folder / CHECKPOINTS)
    assert path is not None, f"{folder} has no checkpoint"
    return load_checkpoint(path)


def _same(one: Any, other: Any) -> bool:
    """Return whether nested values are equal: tensors bit for bit, and NaN equal to itself."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return same and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, Mapping):
        same = isinstance(other, Mapping) and one.keys() == other.keys()
        return same and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return repr(one) == repr(other)


def _same_files(one: Path, other: Path, name: str) -> bool:
    """Return whether a file, or all files below a folder, are the same in two places."""
    return _contents(one / name) == _contents(other / name) != {}


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _without_machine(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not key.startswith(MACHINE)}


def _unless(holds: bool, complaint: str) -> str:
    return "" if holds else complaint
