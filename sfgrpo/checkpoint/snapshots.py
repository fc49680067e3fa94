"""The averaged adapters of a training that are to be judged, published in its folder while it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sfgrpo.runtime.files import atomic_directory, atomic_write, remove_directory
from sfgrpo.runtime.manifest import MANIFEST, verify_manifest, write_manifest

SNAPSHOTS = "snapshots"
"""Folder of the snapshots, below that of the run: of each a folder with the adapter, and a record that outlives it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The record of a published adapter."""

    update: int
    """Updates that the adapter has seen."""
    key: str
    """Names its evaluation in the store."""
    mlflow_run_id: str | None
    """Run in which the evaluation will be recorded, as far as it was known."""


def publish_snapshot(
    folder: Path, update: int, scope: str, save_adapter: Callable[[Path], None], mlflow_run_id: str | None
) -> Snapshot:
    """Writes an adapter, then its record; who finds the record finds the adapter, until that is no longer needed."""
    path = snapshot_path(folder, update)
    with atomic_directory(path) as partial:
        save_adapter(partial)
        write_manifest(partial)
    key = evaluation_key(scope, read_snapshot(folder, update))
    snapshot = Snapshot(update=update, key=key, mlflow_run_id=mlflow_run_id)
    atomic_write(path.with_suffix(".json"), json.dumps(dataclasses.asdict(snapshot)) + "\n")
    return snapshot


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Reads the records of a run's snapshots, by update."""
    paths = sorted((folder / SNAPSHOTS).glob("update-*.json"))
    return [Snapshot(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def read_snapshot(folder: Path, update: int) -> dict[str, bytes]:
    """Reads the files of a snapshot's adapter; raises `IntegrityError` unless all are as they were written."""
    path = snapshot_path(folder, update)
    verify_manifest(path)
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != MANIFEST}


def prune_snapshots(folder: Path, needed: Collection[int]) -> None:
    """Removes all adapters but those of the `needed` updates; the records stay."""
    for path in sorted((folder / SNAPSHOTS).glob("update-*")):
        if path.is_dir() and path not in [snapshot_path(folder, update) for update in needed]:
            remove_directory(path)


def snapshot_path(folder: Path, update: int) -> Path:
    """Names the folder of a snapshot's adapter; the record lies beside it."""
    return folder / SNAPSHOTS / f"update-{update:06d}"


def evaluation_key(scope: str, adapter: Mapping[str, bytes]) -> str:
    """Names the evaluation of an adapter, given by its files; `scope` digests all else that shapes the result."""
    lines = [scope, *(f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(adapter.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
