"""Connections to MLflow stores, look-ups in them, and the difference between an outage and a refusal."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sfgrpo.config.addresses import sqlite_path
from sfgrpo.errors import ConfigError, TrackingError
from sfgrpo.runtime.imports import without_collection
from sfgrpo.runtime.process import ProcessIdentity, this_process
from sfgrpo.runtime.redaction import without_credentials, without_secrets
from sfgrpo.tracking.delivery import first_line
from sfgrpo.tracking.moved import artifact_root
from sfgrpo.tracking.store import prepare_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tag by which MLflow's pages show runs and curves first, rather than traces and judges of language models."""
KEY_TAG = "sfgrpo.key"
"""Marks the runs of this project; its value identifies the work."""
OWNER_HOST_TAG = "sfgrpo.owner_host"
OWNER_PROCESS_TAG = "sfgrpo.owner_process"
"""The process that records a run; if it dies, `close-stale-runs` finds the run by these."""
PAGE_SIZE = 1000


def load_mlflow() -> None:
    """Import MLflow, which takes seconds, without telemetry and with few log messages."""
    # All must be set before the import.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with without_collection():
        import mlflow  # noqa: F401

    for name in ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


def connect(uri: str) -> MlflowClient:
    """Connect to the tracking store at `uri`, which is also the model registry; create a missing SQLite one.

    Raises:
        ConfigError: There is no such store, or one that this version of MLflow cannot use.
        TrackingError: A SQLite store is locked by another process.
    """
    load_mlflow()
    from mlflow import MlflowClient

    prepare_store(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def reachable(uri: str, consequence: str) -> Iterator[MlflowClient]:
    """Connect to the store at `uri` for a block of requests; raise `TrackingError` if it does not answer them.

    Args:
        consequence: end of the error message: what follows from the outage, and what to do.
    """
    try:
        yield connect(uri)
    except Exception as error:
        if isinstance(error, ConfigError | TrackingError) or not is_outage(error):
            raise
        raise TrackingError(
            f"MLFLOW_TRACKING_URI {without_credentials(uri)} does not answer ({without_secrets(first_line(error))}); "
            f"{consequence}"
        ) from error


def find_or_create_experiment(client: MlflowClient, uri: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Return the experiment's id; its files are kept in the folder `mlartifacts` beside a SQLite store.

    A new experiment gets its name and `tags` in one transaction.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(uri)
        location = None if database is None else artifact_root(database).as_uri()
        tags = EXPERIMENT_TAGS | dict(tags or {})
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            # Another process was faster, or the response to an earlier request of this one was lost.
            experiment = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    return str(experiment.experiment_id)


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return a run, or None if the store has none of this id or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def project_runs(client: MlflowClient, condition: str = "") -> Iterator[Run]:
    """Yield the runs of this project in all experiments that meet a condition of MLflow's search syntax."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, condition, max_results=PAGE_SIZE, page_token=token)
        yield from (run for run in page if KEY_TAG in run.data.tags)
        token = page.token
        if not token:
            return


def owner_tags() -> dict[str, str]:
    """Return tags that identify this process; none where nobody could check later whether it still runs."""
    owner = this_process()
    return {} if owner is None else {OWNER_HOST_TAG: owner.host, OWNER_PROCESS_TAG: owner.process}


def owner_of(run: Run) -> ProcessIdentity | None:
    """Return the process that recorded a run last, or None if its tags do not identify one."""
    host, process = run.data.tags.get(OWNER_HOST_TAG), run.data.tags.get(OWNER_PROCESS_TAG)
    return None if host is None or process is None else ProcessIdentity.from_text(host, process)


def is_outage(error: Exception) -> bool:
    """Return whether a retry may succeed: the error is neither a refusal by MLflow nor a bug here."""
    import requests
    from mlflow.exceptions import MlflowException

    status: int | None = None
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]  # not annotated in MLflow
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    if status is not None:
        return status in (408, 429) or status >= 500
    # Errors of databases and object stores have no common base class but `Exception`.
    bugs = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)
    return isinstance(error, OSError) or not isinstance(error, bugs)
