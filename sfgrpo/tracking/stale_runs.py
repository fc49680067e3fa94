"""Ends the MLflow runs whose process died without a word: MLflow itself shows them as RUNNING for ever."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.errors import TrackingError
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.process import is_gone
from sfgrpo.tracking.delivery import first_line
from sfgrpo.tracking.mlflow_client import connect, is_outage
from sfgrpo.tracking.mlflow_tracker import KEY_TAG, owner_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


CLOSED_BY_TAG = "sfgrpo.closed_by"
PAGE_SIZE = 100
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""By its defaults MLflow would try for many minutes; the next sweep comes sooner."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """An MLflow run that says RUNNING, and who recorded it last."""

    run_id: str
    name: str
    experiment_id: str
    owner: str
    """The process that records the run, in words."""
    silent_s: int
    """Seconds since its last record."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep found among the runs that say RUNNING."""

    at_work: Sequence[FoundRun]
    """Their process runs on this machine, or has recorded something lately."""
    closed: Sequence[FoundRun]
    """Their process is gone; they now say KILLED, until somebody resumes them."""
    silent: Sequence[FoundRun]
    """Nothing was heard of them for long, and whether their process lives cannot be seen from here."""

    def write(self, path: Path) -> None:
        """Saves the findings as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def sweep_runs(environment: Environment, quiet_s: float) -> Sweep:
    """Closes the RUNNING runs whose process on this machine is gone, and lists the others that look dead.

    A run of another machine is only listed, once nothing was recorded for `quiet_s` seconds. A run that was closed is
    resumed as any other.

    Raises:
        TrackingError: the store does not answer.
    """
    for name, value in HTTP_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        client = connect(environment.tracking_uri)
        return _sorted(client, quiet_s)
    except Exception as error:
        if not is_outage(error):
            raise
        raise TrackingError(
            f"MLFLOW_TRACKING_URI {environment.tracking_uri} does not answer ({first_line(error)}); start the server "
            "there, and sweep again"
        ) from error


def _sorted(client: MlflowClient, quiet_s: float) -> Sweep:
    at_work: list[FoundRun] = []
    closed: list[FoundRun] = []
    silent: list[FoundRun] = []
    for run in list(_running(client)):
        owner = owner_of(run.data.tags)
        gone = None if owner is None else is_gone(owner)
        found = _found(run)
        if gone and _close(client, run):
            closed.append(found)
        elif gone is None and found.silent_s >= quiet_s:
            silent.append(found)
        else:
            at_work.append(found)
    return Sweep(at_work=at_work, closed=closed, silent=silent)


def _running(client: MlflowClient) -> Iterator[Run]:
    """Lists the RUNNING runs of this project, in all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=PAGE_SIZE, page_token=token)
        yield from (run for run in page if KEY_TAG in run.data.tags)
        token = page.token
        if not token:
            return


def _close(client: MlflowClient, run: Run) -> bool:
    """Ends a run whose owner is gone; False when somebody else took it up or ended it meanwhile."""
    run_id, owner = run.info.run_id, owner_of(run.data.tags)
    now = client.get_run(run_id)
    if now.info.status != "RUNNING" or owner_of(now.data.tags) != owner:
        return False
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    client.set_tag(run_id, CLOSED_BY_TAG, f"sweep on {socket.gethostname()}, {when}: {owner} is gone")
    client.set_terminated(run_id, "KILLED")
    if owner_of(client.get_run(run_id).data.tags) == owner:
        return True
    # Taken up between the two looks: whoever resumes a run names himself before he opens it.
    client.update_run(run_id, status="RUNNING")
    return False


def _found(run: Run) -> FoundRun:
    owner = owner_of(run.data.tags)
    last_ms = max([run.info.start_time, *(metric.timestamp for metric in run.data._metric_objs)])
    return FoundRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        experiment_id=run.info.experiment_id,
        owner="unknown" if owner is None else str(owner),
        silent_s=max(0, int(time.time() - last_ms / 1000)),
    )
