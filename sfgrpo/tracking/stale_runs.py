"""Close MLflow runs whose process died; MLflow alone would show them as RUNNING for ever."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import time
from typing import TYPE_CHECKING

from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.process import ProcessIdentity, is_gone
from sfgrpo.tracking.mlflow_client import owner_of, project_runs, reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CLOSED_BY_TAG = "sfgrpo.closed_by"
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""By its own defaults MLflow would retry for many minutes; the next check comes sooner."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunningRun:
    """A run with the status RUNNING."""

    run_id: str
    name: str
    experiment_id: str
    owner: str
    """The process that recorded it last, for people."""
    silent_s: int
    """Seconds since its last record."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunningRuns:
    """The runs with the status RUNNING, by what became of their process."""

    at_work: list[RunningRun]
    """The process runs on this machine, or has recorded something lately."""
    closed: list[RunningRun]
    """The process is gone; the run is now KILLED until somebody resumes it."""
    silent: list[RunningRun]
    """Nothing was recorded for long, and the process cannot be checked from here."""


def close_stale_runs(environment: Environment, quiet_s: float) -> RunningRuns:
    """Close the RUNNING runs whose process on this machine is gone, and list those that may be dead.

    A run of another machine is only listed, once nothing was recorded for `quiet_s` seconds. A closed run can be
    resumed like any other.

    Raises:
        TrackingError: the store does not answer.
    """
    for name, value in HTTP_SETTINGS.items():
        os.environ.setdefault(name, value)
    runs = RunningRuns(at_work=[], closed=[], silent=[])
    with reachable(environment.tracking_uri, "start the server there and run this command again") as client:
        # A list, because closing runs changes what the next page would hold.
        for run in list(project_runs(client, "attributes.status = 'RUNNING'")):
            owner = owner_of(run)
            described = _describe(run, owner)
            gone = None if owner is None else is_gone(owner)
            if gone and _close(client, run):
                runs.closed.append(described)
            elif gone is None and described.silent_s >= quiet_s:
                runs.silent.append(described)
            else:
                runs.at_work.append(described)
    return runs


def _close(client: MlflowClient, run: Run) -> bool:
    """End a run whose owner is gone; return False if it was resumed or ended meanwhile."""
    run_id, owner = run.info.run_id, owner_of(run)
    now = client.get_run(run_id)
    if now.info.status != "RUNNING" or owner_of(now) != owner:
        return False
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    client.set_tag(run_id, CLOSED_BY_TAG, f"close-stale-runs on {socket.gethostname()}, {when}: {owner} is gone")
    client.set_terminated(run_id, "KILLED")
    if owner_of(client.get_run(run_id)) == owner:
        return True
    # Resumed between the two requests: a resumed run gets its new owner before its status.
    client.update_run(run_id, status="RUNNING")
    return False


def _describe(run: Run, owner: ProcessIdentity | None) -> RunningRun:
    last_ms = max([run.info.start_time, *(metric.timestamp for metric in run.data._metric_objs)])
    return RunningRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        experiment_id=run.info.experiment_id,
        owner="unknown" if owner is None else str(owner),
        silent_s=max(0, int(time.time() - last_ms / 1000)),
    )
