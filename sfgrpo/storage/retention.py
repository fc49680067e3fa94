"""Remove the resumable state of finished trainings from local disk and from the S3 mirror."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.paths import RUN_PREFIX, run_lock
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import remove_directory
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import MANIFEST
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking.mlflow_client import KEY_TAG, project_runs, reachable
from sfgrpo.tracking.provenance import BRANCH_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A folder or S3 prefix that was removed or, in a rehearsal, would be."""

    name: str
    """Name of the run."""
    place: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What was removed and what stays."""

    removed: Sequence[Removed]
    kept: Sequence[str]
    """Names of runs that are unfinished, recently finished, in use or unknown to MLflow."""
    branches: Sequence[str]
    """Git branches of the registered versions that an alias points to."""


def remove_finished(environment: Environment, days: float, *, rehearsal: bool) -> Retention:
    """Remove the resumable state of runs that FINISHED in MLflow more than `days` ago.

    Failed and stopped runs may still be resumed, and a run unknown to MLflow may belong to somebody else: they stay.

    Raises:
        TrackingError: MLflow does not answer; nothing was removed.
        MirrorError: the bucket cannot be used; local state was already removed.
    """
    consequence = "nothing was removed, because which runs are finished is unknown"
    with reachable(environment.tracking_uri, consequence) as client:
        runs: dict[str, list[Run]] = {}
        for run in project_runs(client):
            runs.setdefault(f"{RUN_PREFIX}{run.data.tags[KEY_TAG][:16]}", []).append(run)
        branches = _branches_in_use(client)
    removed: list[Removed] = []
    kept: set[str] = set()

    def consider(name: str, remove: Callable[[], Removed]) -> None:
        with exclusive_lock(run_lock(environment.scratch_dir / name)) as unused:
            if unused and _is_over(runs.get(name, ()), days):
                removed.append(remove())
            else:
                kept.add(name)

    for folder in sorted(environment.scratch_dir.glob(f"{RUN_PREFIX}*")):
        consider(folder.name, functools.partial(_remove_folder, folder, rehearsal))
    for name in () if environment.mirror is None else Bucket(environment.mirror).folders():
        consider(name, functools.partial(_remove_objects, f"{environment.mirror}/{name}", name, rehearsal))
    return Retention(removed=removed, kept=sorted(kept), branches=branches)


def _branches_in_use(client: MlflowClient) -> list[str]:
    """Return the branches of the registered versions that an alias points to."""
    used: set[str] = set()
    for model in client.search_registered_models():
        for number in model.aliases.values():
            tags = client.get_model_version(model.name, number).tags
            used |= {tags[BRANCH_TAG]} if BRANCH_TAG in tags else set()
    return sorted(used)


def _is_over(runs: Sequence[Run], days: float) -> bool:
    """Return whether all runs of a key FINISHED more than `days` ago; False without runs."""
    latest_ms = (time.time() - days * 24 * 3600) * 1000
    return bool(runs) and all(run.info.status == "FINISHED" and run.info.end_time < latest_ms for run in runs)


def _remove_folder(folder: Path, rehearsal: bool) -> Removed:
    num_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if not rehearsal:
        remove_directory(folder)
    return Removed(name=folder.name, place=str(folder), num_bytes=num_bytes)


def _remove_objects(uri: str, name: str, rehearsal: bool) -> Removed:
    bucket = Bucket(uri)
    sizes = bucket.sizes()
    # Manifests first: a half-removed checkpoint must not look complete.
    for key in sorted(sizes, key=lambda key: (not key.endswith(f"/{MANIFEST}"), key)):
        if not rehearsal:
            bucket.remove(key)
    return Removed(name=name, place=bucket.uri, num_bytes=sum(sizes.values()))
