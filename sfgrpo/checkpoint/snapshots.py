"""Snapshots: the averaged adapters of a training that are due for evaluation, published in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sfgrpo.checkpoint.format import FORMAT, require_format
from sfgrpo.runtime.files import atomic_directory, atomic_write, remove_directory
from sfgrpo.runtime.manifest import MANIFEST, verify_manifest, write_manifest

SNAPSHOTS = "snapshots"
"""Folder of the snapshots, below that of the run: for each a folder with the adapter, and a record that outlives it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The record of a published adapter."""

    update: int
    """Updates that the adapter has seen."""
    key: str
    """Key of its evaluation in the store."""
    mlflow_run_id: str | None
    """Run in which the evaluation will be recorded, as far as it was known."""


def publish_snapshot(
    folder: Path, update: int, fingerprint: str, mlflow_run_id: str | None, save_adapter: Callable[[Path], None]
) -> Snapshot:
    """Write an adapter, then its record: a reader of the record finds the adapter for as long as it is needed."""
    with atomic_directory(snapshot_path(folder, update)) as partial:
        save_adapter(partial)
        write_manifest(partial)
    return record_snapshot(folder, update, fingerprint, mlflow_run_id)


def record_snapshot(folder: Path, update: int, fingerprint: str, mlflow_run_id: str | None) -> Snapshot:
    """Write the record of a published adapter, for evaluations of this fingerprint."""
    key = evaluation_key(fingerprint, read_snapshot(folder, update))
    snapshot = Snapshot(update=update, key=key, mlflow_run_id=mlflow_run_id)
    record = json.dumps({"format": FORMAT, **dataclasses.asdict(snapshot)})
    atomic_write(snapshot_path(folder, update).with_suffix(".json"), record + "\n")
    return snapshot


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Read the records of a run's snapshots, by update; raise `ConfigError` for one of another format."""
    snapshots = []
    for path in sorted((folder / SNAPSHOTS).glob("update-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        require_format(record.pop("format", None), path)
        snapshots.append(Snapshot(**record))
    return snapshots


def read_snapshot(folder: Path, update: int) -> dict[str, bytes]:
    """Read the files of a snapshot's adapter; raise `IntegrityError` unless all are as they were written."""
    path = snapshot_path(folder, update)
    verify_manifest(path)
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != MANIFEST}


def prune_snapshots(folder: Path, needed: Collection[int]) -> None:
    """Remove all adapters but those of the `needed` updates; the records stay."""
    kept = {snapshot_path(folder, update) for update in needed}
    for path in sorted((folder / SNAPSHOTS).glob("update-*")):
        if path.is_dir() and path not in kept:
            remove_directory(path)


def snapshot_path(folder: Path, update: int) -> Path:
    """Return the folder of a snapshot's adapter; the record lies beside it."""
    return folder / SNAPSHOTS / f"update-{update:06d}"


def evaluation_key(fingerprint: str, adapter: Mapping[str, bytes]) -> str:
    """Return the key of the evaluation of an adapter; `fingerprint` digests all else that shapes the result."""
    digests = (f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(adapter.items()))
    return hashlib.sha256("\n".join([fingerprint, *digests]).encode()).hexdigest()
