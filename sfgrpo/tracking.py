"""Records what a run did: to MLflow, or to lists in tests."""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sfgrpo.files import sha256_of_file
from sfgrpo.signals import sigterm_as_exit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Item = TypeVar("Item")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "sfgrpo.key"
PARENT_TAG = "mlflow.parentRunId"
IMAGE_TAG_PREFIX = "sfgrpo.image_step."
MAX_ENTRIES_PER_REQUEST = 100
"""MLflow takes no more parameters or tags than this at once."""
MAX_PARAM_LENGTH = 6000


class Tracker(abc.ABC):
    """Records one run: what it was told, what it measured, what it made.

    A run that is tracked again after a crash goes on where it stopped: a metric or an image whose step was already
    recorded is left out, so that replayed updates show once.
    """

    @property
    @abc.abstractmethod
    def run_id(self) -> str | None:
        """Names the run; None as long as nothing was recorded."""

    @abc.abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters; nested mappings become dotted names."""

    @abc.abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers at an update."""

    @abc.abstractmethod
    def log_image(self, path: Path, key: str, step: int) -> None:
        """Records an image file as the state of `key` at an update."""

    @abc.abstractmethod
    def log_text(self, text: str, name: str) -> None:
        """Records a text, such as a Markdown table, as the file `name`, replacing an earlier one."""

    @abc.abstractmethod
    def log_prompts(self, path: Path, name: str, context: Literal["training", "evaluation"]) -> None:
        """Records a prompt file as a data set that the run reads; its digest identifies it."""

    @abc.abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels the run."""

    @abc.abstractmethod
    def finish(self, status: RunStatus) -> None:
        """Ends the run; does nothing if nothing was recorded."""


class RecordingTracker(Tracker):
    """Keeps everything in public lists and dicts, for tests."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.images: list[tuple[str, int, Path]] = []
        self.texts: dict[str, str] = {}
        self.prompts: list[tuple[str, str, str]] = []
        self.tags: dict[str, str] = {}
        self.status: RunStatus | None = None

    @property
    def run_id(self) -> str:
        return "recorded"

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= flatten(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append((step, float(value)))

    def log_image(self, path: Path, key: str, step: int) -> None:
        self.images.append((key, step, path))

    def log_text(self, text: str, name: str) -> None:
        self.texts[name] = text

    def log_prompts(self, path: Path, name: str, context: Literal["training", "evaluation"]) -> None:
        self.prompts.append((name, context, sha256_of_file(path)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def finish(self, status: RunStatus) -> None:
        self.status = status


class MlflowTracker(Tracker):
    """Records to MLflow; the run is created by the first thing recorded, so that a skipped stage leaves none.

    An earlier run is reopened when `run_id` names it or, failing that, when it carries the same `key`.
    """

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        run_name: str | None = None,
        run_id: str | None = None,
        key: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        """Connects to nothing yet; `key` identifies the work, such as a digest of everything that shapes it."""
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._wanted_run_id = run_id
        self._tags = {KEY_TAG: key, PARENT_TAG: parent_run_id}
        self._key = key
        self._client: MlflowClient | None = None
        self._run: Run | None = None
        self._last_steps: dict[str, int] | None = None
        """Last step of every metric key looked up so far; None in a run that was just created."""

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else self._run.info.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        client, run = self._opened()
        for chunk in chunks(list(flatten(params).items()), MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, params=[Param(key, value[:MAX_PARAM_LENGTH]) for key, value in chunk])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        client, run = self._opened()
        now_ms = time.time_ns() // 1_000_000
        entries = [
            Metric(key, float(value), now_ms, step) for key, value in metrics.items() if step > self._last_step(key)
        ]
        for chunk in chunks(entries, MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, metrics=chunk)

    def log_image(self, path: Path, key: str, step: int) -> None:
        from PIL import Image

        client, run = self._opened()
        tag = IMAGE_TAG_PREFIX + key
        if step <= int(run.data.tags.get(tag, -1)):
            return
        with Image.open(path) as image:
            client.log_image(run.info.run_id, image, key=key, step=step)
        client.set_tag(run.info.run_id, tag, step)

    def log_text(self, text: str, name: str) -> None:
        client, run = self._opened()
        client.log_text(run.info.run_id, text, name)

    def log_prompts(self, path: Path, name: str, context: Literal["training", "evaluation"]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run = self._opened()
        num_prompts = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        dataset = Dataset(
            name=name,
            digest=sha256_of_file(path)[:16],
            source_type="local",
            source=json.dumps({"uri": str(path)}),
            profile=json.dumps({"num_rows": num_prompts}),
        )
        client.log_inputs(run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        client, run = self._opened()
        for chunk in chunks([RunTag(key, value) for key, value in tags.items()], MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, tags=chunk)

    def finish(self, status: RunStatus) -> None:
        if self._client is not None and self._run is not None:
            self._client.set_terminated(self._run.info.run_id, status)

    def _opened(self) -> tuple[MlflowClient, Run]:
        if self._client is None:
            self._client = connect(self._uri)
        if self._run is None:
            self._run = self._reopened(self._client) or self._created(self._client)
        return self._client, self._run

    def _reopened(self, client: MlflowClient) -> Run | None:
        run = find_run(client, self._wanted_run_id) if self._wanted_run_id else None
        if run is None and self._key is not None:
            experiment_id = find_or_create_experiment(client, self._uri, self._experiment)
            run = next(
                iter(client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{self._key}'", max_results=1)), None
            )
        if run is not None:
            client.update_run(run.info.run_id, status="RUNNING")
            self._last_steps = {}
        return run

    def _created(self, client: MlflowClient) -> Run:
        experiment_id = find_or_create_experiment(client, self._uri, self._experiment)
        tags = {name: value for name, value in self._tags.items() if value is not None}
        return client.create_run(experiment_id, run_name=self._run_name, tags=tags)

    def _last_step(self, key: str) -> int:
        client, run = self._opened()
        if self._last_steps is None:
            return -1
        if key not in self._last_steps:
            history = client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]


@contextlib.contextmanager
def ending(tracker: Tracker) -> Iterator[Tracker]:
    """Ends the run of `tracker` with the block: FINISHED, FAILED by an error, KILLED by Ctrl-C or SIGTERM.

    MLflow itself leaves the run of a process that was told to stop as RUNNING for ever.
    """
    try:
        with sigterm_as_exit():
            yield tracker
    except (KeyboardInterrupt, SystemExit):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def connect(uri: str) -> MlflowClient:
    """Opens the tracking store at `uri`, which is also the model registry; makes a SQLite one if it is absent."""
    # Both have to be set before MLflow is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        # With a write-ahead log the 65 tables are made in less than half the time, and a reader blocks no writer.
        database.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the experiment's id; beside a SQLite store its files go to the folder `mlartifacts`."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    database = sqlite_path(uri)
    location = None if database is None else (database.resolve().parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


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


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turns nested mappings into dotted names, and values into the text that `params.yaml` would hold."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cuts a sequence into pieces of `size` items, the last perhaps shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of a SQLite store, and None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
