"""One MLflow run, written by requests that may be repeated."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.tracking.mlflow_client import KEY_TAG, connect, find_or_create_experiment, find_run, owner_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
IMAGES_TAG = "mlflow.loggedImages"
"""Tag by which MLflow's pages look for images."""
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The delivery queue retries; by its own defaults MLflow would block for many minutes before it fails."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class MlflowRun:
    """A run that is created or reopened by the first request.

    Every request may be repeated without harm, because one whose response was lost may have succeeded: MLflow ignores
    a metric whose key, step, value and time it already has. Not thread-safe.
    """

    uri: str
    experiment: str
    run_name: str | None
    wanted_run_id: str | None
    """An earlier run to reopen."""
    key: str
    """By it the run is found again, even if the response to its creation was lost."""
    parent_run_id: str | None
    _client: MlflowClient | None = None
    _run: Run | None = None
    _last_steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Last step of every metric that was looked up or sent."""
    _image_names: set[str] | None = None
    """Image files of the run; None until they are looked up."""

    @property
    def run_id(self) -> str | None:
        """The id of the run; None before the first successful request."""
        return None if self._run is None else self._run.info.run_id

    def open(self) -> tuple[MlflowClient, Run]:
        """Reopen or create the run; return it as it was then, with the client."""
        if self._client is None:
            for name, value in HTTP_SETTINGS.items():
                os.environ.setdefault(name, value)
            self._client = connect(self.uri)
        if self._run is None:
            self._run = self._reopen_or_create(self._client)
        return self._client, self._run

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log parameters."""
        from mlflow.entities import Param

        client, run = self.open()
        client.log_batch(run.info.run_id, params=[Param(*item) for item in params.items()], synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        """Log the metrics whose last step is before `step`."""
        from mlflow.entities import Metric

        client, run = self.open()
        entries = [Metric(key, value, time_ms, step) for key, value in metrics.items() if step > self._last_step(key)]
        client.log_batch(run.info.run_id, metrics=entries, synchronous=True)
        self._last_steps |= {metric.key: step for metric in entries}

    def log_image(self, image: bytes, thumbnail: bytes, prefix: str, stem: str) -> None:
        """Log an image as `stem`, or complete an earlier one whose name starts with `prefix`.

        MLflow's own `log_image` makes up a name at every call, so a repeated request would show the image twice.
        """
        client, run = self.open()
        if self._image_names is None:
            self._image_names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")}
        earlier = (name.removesuffix(".png") for name in self._image_names if name.startswith(prefix))
        stem = next((name for name in earlier if not name.endswith(".webp")), stem)
        for name, content in ((f"{stem}.png", image), (f"{stem}+compressed.webp", thumbnail)):
            if name in self._image_names:
                continue
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, name).write_bytes(content)
                client.log_artifact(run.info.run_id, str(Path(folder, name)), "images")
            self._image_names.add(name)
        client.set_tag(run.info.run_id, IMAGES_TAG, "True", synchronous=True)

    def log_text(self, text: str, name: str) -> None:
        """Log a text file."""
        client, run = self.open()
        client.log_text(run.info.run_id, text, name)

    def log_dataset(self, fields: Mapping[str, str], context: str) -> None:
        """Log an input with the fields of MLflow's `Dataset`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run = self.open()
        dataset_input = DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
        client.log_inputs(run.info.run_id, [dataset_input])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        client, run = self.open()
        _set_tags(client, run, tags)

    def end(self, status: str) -> None:
        """Set the final status."""
        client, run = self.open()
        client.set_terminated(run.info.run_id, status)

    def _reopen_or_create(self, client: MlflowClient) -> Run:
        run = find_run(client, self.wanted_run_id) if self.wanted_run_id else None
        if run is None:
            experiment_id = find_or_create_experiment(client, self.uri, self.experiment)
            found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{self.key}'", max_results=10)
            # There are two if the server handled a repeated creation twice; one of them is empty.
            run = max(found, key=lambda run: len(run.data.metrics), default=None)
            if run is None:
                parent = {} if self.parent_run_id is None else {PARENT_TAG: self.parent_run_id}
                tags = {KEY_TAG: self.key, **owner_tags(), **parent}
                return client.create_run(experiment_id, run_name=self.run_name, tags=tags)
        # The owner first, so that `close-stale-runs` does not close the run for its dead owner.
        _set_tags(client, run, owner_tags())
        client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _last_step(self, key: str) -> int:
        client, run = self.open()
        if key not in self._last_steps:
            # `run` is as it was when opened, so a new key costs no request.
            history = client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]


def _set_tags(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run.info.run_id, tags=[RunTag(*item) for item in tags.items()], synchronous=True)
