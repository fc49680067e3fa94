"""Opens MLflow stores, finds what is in them, and tells their outages from their refusals."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def load_mlflow() -> None:
    """Imports MLflow, which takes seconds, without its telemetry and the least of its messages."""
    # All have to be set before the import.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow  # noqa: F401

    for name in ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages show runs and their curves first, and not traces and judges of language models."""


def connect(uri: str) -> MlflowClient:
    """Opens the tracking store at `uri`, which is also the model registry; makes a SQLite one if it is absent."""
    load_mlflow()
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database is not None and not database.exists():
        # With a write-ahead log the 65 tables are made in less than half the time, and a reader blocks no writer.
        database.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_or_create_experiment(client: MlflowClient, uri: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Returns the experiment's id; beside a SQLite store its files go to the folder `mlartifacts`.

    An experiment that is created gets `tags` together with its name, in one transaction.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    database = sqlite_path(uri)
    location = None if database is None else (database.resolve().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS | dict(tags or {})))
    except MlflowException as error:
        # Another process was faster, or this one was without hearing of it.
        experiment = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
            raise
        return str(experiment.experiment_id)


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Looks a run up; None when the store never had it or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def is_outage(error: Exception) -> bool:
    """Tells whether another try may succeed, as against a request that MLflow refuses or a mistake of ours."""
    import requests
    from mlflow.exceptions import MlflowException

    status: int | None = None
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    if status is not None:
        return status in (408, 429) or status >= 500
    # Databases and object stores have errors of their own, with no root but `Exception`.
    mistakes = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)
    return isinstance(error, OSError) or not isinstance(error, mistakes)


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of a SQLite store, and None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
