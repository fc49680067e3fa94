"""Removes what finished trainings left behind to be resumed by, from the disk and from the bucket that mirrors them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.errors import TrackingError
from sfgrpo.paths import RUN_PREFIX, run_lock
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_write, remove_directory
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import MANIFEST
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking.delivery import first_line
from sfgrpo.tracking.mlflow_client import connect, is_outage
from sfgrpo.tracking.mlflow_tracker import KEY_TAG
from sfgrpo.tracking.provenance import BRANCH_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


PAGE_SIZE = 1000
DAY_MS = 24 * 3600 * 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """One place that is empty now or, in a rehearsal, would be."""

    name: str
    """Name of the run."""
    place: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What was removed, and what has to stay."""

    removed: Sequence[Removed]
    kept: Sequence[str]
    """Names of runs that are not finished, finished lately, in use, or unknown to MLflow."""
    branches: Sequence[str]
    """Git branches of the versions that an alias of the registry points to."""

    def write(self, path: Path) -> None:
        """Saves it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def remove_finished(environment: Environment, days: float, *, rehearsal: bool) -> Retention:
    """Removes the resumable state of runs that MLflow says were FINISHED more than so many days ago.

    A run that failed or was stopped may still go on, and one of which MLflow knows nothing may be anybody's: they stay.

    Raises:
        TrackingError: MLflow does not answer; nothing was removed.
        MirrorError: the bucket cannot be used; what is on the disk was removed.
    """
    try:
        client = connect(environment.tracking_uri)
        runs = _runs_by_name(client)
        branches = _branches_in_use(client)
    except Exception as error:
        if not is_outage(error):
            raise
        raise TrackingError(
            f"MLFLOW_TRACKING_URI {environment.tracking_uri} does not answer ({first_line(error)}); nothing was "
            "removed, since what is finished is not known"
        ) from error
    removed: list[Removed] = []
    kept: set[str] = set()
    for folder in sorted(environment.scratch_dir.glob(f"{RUN_PREFIX}*")):
        with exclusive_lock(run_lock(folder)) as unused:
            if unused and _is_over(runs.get(folder.name, ()), days):
                removed.append(_remove_folder(folder, rehearsal))
            else:
                kept.add(folder.name)
    for name in () if environment.mirror is None else Bucket(environment.mirror).folders():
        with exclusive_lock(run_lock(environment.scratch_dir / name)) as unused:
            if unused and _is_over(runs.get(name, ()), days):
                removed.append(_remove_objects(f"{environment.mirror}/{name}", name, rehearsal))
            else:
                kept.add(name)
    return Retention(removed=removed, kept=sorted(kept), branches=branches)


def _runs_by_name(client: MlflowClient) -> Mapping[str, list[Run]]:
    """Lists the runs of MLflow under the name of the folder that each of them has."""
    found: dict[str, list[Run]] = {}
    for run in _all_runs(client):
        if (key := run.data.tags.get(KEY_TAG)) is not None:
            found.setdefault(f"{RUN_PREFIX}{key[:16]}", []).append(run)
    return found


def _all_runs(client: MlflowClient) -> Iterator[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, max_results=PAGE_SIZE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _branches_in_use(client: MlflowClient) -> list[str]:
    """Lists the branches of the versions that somebody uses by alias."""
    used: set[str] = set()
    for model in client.search_registered_models():
        for number in model.aliases.values():
            tags = client.get_model_version(model.name, number).tags
            used |= {tags[BRANCH_TAG]} if BRANCH_TAG in tags else set()
    return sorted(used)


def _is_over(runs: Sequence[Run], days: float) -> bool:
    """Tells whether all runs of a key are finished for so long; False when there are none."""
    latest_ms = time.time() * 1000 - days * DAY_MS
    return bool(runs) and all(run.info.status == "FINISHED" and run.info.end_time < latest_ms for run in runs)


def _remove_folder(folder: Path, rehearsal: bool) -> Removed:
    num_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if not rehearsal:
        remove_directory(folder)
    return Removed(name=folder.name, place=str(folder), num_bytes=num_bytes)


def _remove_objects(uri: str, name: str, rehearsal: bool) -> Removed:
    bucket = Bucket(uri)
    sizes = bucket.sizes()
    # Manifests first: a checkpoint that is half removed must not look whole.
    for key in sorted(sizes, key=lambda key: (not key.endswith(f"/{MANIFEST}"), key)):
        if not rehearsal:
            bucket.remove(key)
    return Removed(name=name, place=bucket.uri, num_bytes=sum(sizes.values()))
