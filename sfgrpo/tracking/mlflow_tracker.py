"""Records a run to MLflow, whether its server is up or not, every step once."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sfgrpo.errors import TrackingError
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.runtime.process import ProcessIdentity, this_process
from sfgrpo.tracking.base import RunStatus, Tracker, param_texts
from sfgrpo.tracking.delivery import DeliveryQueue, first_line
from sfgrpo.tracking.mlflow_client import connect, find_or_create_experiment, find_run, is_outage, load_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


Item = TypeVar("Item")

logger = logging.getLogger(__name__)

KEY_TAG = "sfgrpo.key"
OWNER_HOST_TAG = "sfgrpo.owner_host"
OWNER_PROCESS_TAG = "sfgrpo.owner_process"
"""The process that records the run: should it die without a word, a sweep finds the run by these."""
PARENT_TAG = "mlflow.parentRunId"
IMAGES_TAG = "mlflow.loggedImages"
"""Makes MLflow's pages look for images."""
MAX_ENTRIES_PER_REQUEST = 100
"""MLflow takes no more parameters or tags than this at once."""
MAX_PARAM_LENGTH = 6000
MAX_THUMBNAIL_PIXELS = 256
OPEN_S = 60.0
"""A server takes half a minute to start."""
FLUSH_S: Mapping[RunStatus, float] = {"FINISHED": 300.0, "FAILED": 30.0, "KILLED": 5.0}
"""How long the end of a run waits for deliveries; one that is resumed delivers what is missing from its history."""
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The outbox does the retries; by its defaults MLflow would block a request for many minutes before it fails."""


class MlflowTracker(Tracker):
    """Records to MLflow; the run is created by the first thing recorded, so that a skipped stage leaves none.

    An earlier run is reopened when `run_id` names it or, failing that, when it carries the same `key`.

    Only the thread of the outbox talks to MLflow: the methods named `_send` and what they call. Each does no harm when
    repeated, since a request may have been carried out although its answer was lost. For metrics this is so because
    MLflow ignores one whose key, step, value and time it has.
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
        # A key of its own lets a run be found whose creation went unanswered.
        self._key = uuid.uuid4().hex if key is None else key
        self._parent_run_id = parent_run_id
        self._outbox = DeliveryQueue(f"MLflow at {uri}", is_outage)
        self._client: MlflowClient | None = None
        self._run: Run | None = None
        self._last_steps: dict[str, int] = {}
        """Last step of every metric key that was looked up or sent."""
        self._image_names: set[str] | None = None
        """Image files of the run; None until they are looked up."""

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else self._run.info.run_id

    def open(self) -> None:
        self._put(self._opened)
        num_left = len(self._outbox)
        while not self._outbox.drained(time.monotonic() + OPEN_S):
            # A backlog may take longer than a server that is away is given; it gets shorter, though.
            num_before, num_left = num_left, len(self._outbox)
            if num_left == num_before:
                reason = first_line(self._outbox.outage or TimeoutError(f"nothing in {OPEN_S:g} s"))
                self._outbox.discard()
                raise TrackingError(
                    f"MLFLOW_TRACKING_URI {self._uri} does not answer ({reason}); "
                    "start the server there, or unset the variable to record to a file"
                )
        self._raise_refusal()

    def log_params(self, params: Mapping[str, Any]) -> None:
        flat = {key: value[:MAX_PARAM_LENGTH] for key, value in param_texts(params).items()}
        self._put(functools.partial(self._send_params, flat))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        self._put(functools.partial(self._send_metrics, values, step, now_ms()))

    def log_image(self, path: Path, key: str, step: int) -> None:
        # Read here: by the time that the server is back, the file may have been removed.
        image = path.read_bytes()
        start = f"{key.replace('/', '~')}+step+{step}+timestamp+"
        stem = f"{start}{now_ms()}+{uuid.uuid4()}"
        self._put(functools.partial(self._send_image, image, thumbnail(image), start, stem))

    def log_text(self, text: str, name: str) -> None:
        self._put(functools.partial(self._send_text, text, name))

    def log_prompts(self, path: Path, name: str, context: Literal["training", "evaluation"]) -> None:
        num_prompts = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        fields = {
            "name": name,
            "digest": sha256_of_file(path)[:16],
            "source_type": "local",
            "source": json.dumps({"uri": str(path)}),
            "profile": json.dumps({"num_rows": num_prompts}),
        }
        self._put(functools.partial(self._send_dataset, fields, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put(functools.partial(self._send_tags, dict(tags)))

    def finish(self, status: RunStatus) -> None:
        if self._run is None and not self._outbox:
            return
        deadline = time.monotonic() + FLUSH_S[status]
        if self._outbox.outage is not None:
            logger.warning("waiting up to %g s for MLflow at %s to take the end of the run", FLUSH_S[status], self._uri)
        self._outbox.drained(deadline)
        refusal = self._outbox.take_refusal()
        # Queued even during an outage: it may end while the process still has something to do.
        self._outbox.put(functools.partial(self._send_end, "FAILED" if refusal and status == "FINISHED" else status))
        delivered = self._outbox.drained(deadline)
        refusal = refusal or self._outbox.take_refusal()
        if refusal is None and delivered:
            return
        complaint = self._refused(refusal) if refusal else self._undelivered(FLUSH_S[status])
        if status == "FINISHED":
            raise TrackingError(complaint) from refusal
        logger.warning("%s", complaint)

    def _put(self, send: Callable[[], object]) -> None:
        self._raise_refusal()
        # By the caller's thread, since two threads that import at once can get in each other's way.
        load_mlflow()
        self._outbox.put(send)

    def _raise_refusal(self) -> None:
        refusal = self._outbox.take_refusal()
        if refusal is not None:
            raise TrackingError(self._refused(refusal)) from refusal

    def _refused(self, refusal: Exception) -> str:
        return (
            f"MLflow at {self._uri} refuses to record the run ({first_line(refusal)}); mend that, then start the run "
            "again, and it goes on"
        )

    def _undelivered(self, waited_s: float) -> str:
        outage = self._outbox.outage
        reason = "" if outage is None else f" ({first_line(outage)})"
        return (
            f"MLflow at {self._uri} did not take {len(self._outbox)} records of the run within {waited_s:g} s{reason}; "
            "start the run again when it is back, and it records what is missing"
        )

    def _send_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        client, run = self._opened()
        for chunk in chunks([Param(key, value) for key, value in params.items()], MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, params=chunk, synchronous=True)

    def _send_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        client, run = self._opened()
        entries = [Metric(key, value, time_ms, step) for key, value in metrics.items() if step > self._last_step(key)]
        for chunk in chunks(entries, MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, metrics=chunk, synchronous=True)
            self._last_steps |= {metric.key: step for metric in chunk}

    def _send_image(self, image: bytes, small: bytes, start: str, stem: str) -> None:
        # `log_image` of MLflow makes up a name at every call, so a repeated one would show the image twice.
        client, run = self._opened()
        if self._image_names is None:
            self._image_names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")}
        earlier = (name.removesuffix(".png") for name in self._image_names if name.startswith(start))
        stem = next((name for name in earlier if not name.endswith(".webp")), stem)
        for name, content in ((f"{stem}.png", image), (f"{stem}+compressed.webp", small)):
            if name in self._image_names:
                continue
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, name).write_bytes(content)
                client.log_artifact(run.info.run_id, str(Path(folder, name)), "images")
            self._image_names.add(name)
        client.set_tag(run.info.run_id, IMAGES_TAG, "True", synchronous=True)

    def _send_text(self, text: str, name: str) -> None:
        client, run = self._opened()
        client.log_text(run.info.run_id, text, name)

    def _send_dataset(self, fields: Mapping[str, str], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run = self._opened()
        dataset_input = DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
        client.log_inputs(run.info.run_id, [dataset_input])

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        client, run = self._opened()
        for chunk in chunks([RunTag(key, value) for key, value in tags.items()], MAX_ENTRIES_PER_REQUEST):
            client.log_batch(run.info.run_id, tags=chunk, synchronous=True)

    def _send_end(self, status: RunStatus) -> None:
        client, run = self._opened()
        client.set_terminated(run.info.run_id, status)

    def _opened(self) -> tuple[MlflowClient, Run]:
        if self._client is None:
            for name, value in HTTP_SETTINGS.items():
                os.environ.setdefault(name, value)
            self._client = connect(self._uri)
        if self._run is None:
            self._run = self._reopened(self._client) or self._created(self._client)
        return self._client, self._run

    def _reopened(self, client: MlflowClient) -> Run | None:
        from mlflow.entities import RunTag

        run = find_run(client, self._wanted_run_id) if self._wanted_run_id else None
        if run is None:
            experiment_id = find_or_create_experiment(client, self._uri, self._experiment)
            found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{self._key}'", max_results=10)
            # There are two if the server carried out a creation after it was asked again; one of them is empty.
            run = max(found, key=lambda run: len(run.data.metrics), default=None)
        if run is not None:
            # The owner first: a sweep that still saw the dead one must not close the run under the new one.
            client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in owner_tags().items()], synchronous=True)
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _created(self, client: MlflowClient) -> Run:
        experiment_id = find_or_create_experiment(client, self._uri, self._experiment)
        tags = {KEY_TAG: self._key, **owner_tags()}
        if self._parent_run_id is not None:
            tags[PARENT_TAG] = self._parent_run_id
        return client.create_run(experiment_id, run_name=self._run_name, tags=tags)

    def _last_step(self, key: str) -> int:
        client, run = self._opened()
        if key not in self._last_steps:
            # `run` is as it was opened, so this asks nothing about a key that is new.
            history = client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]


def owner_tags() -> dict[str, str]:
    """Names this process as the one that records a run; empty where nobody could tell later whether it runs."""
    owner = this_process()
    return {} if owner is None else {OWNER_HOST_TAG: owner.host, OWNER_PROCESS_TAG: owner.process}


def owner_of(tags: Mapping[str, str]) -> ProcessIdentity | None:
    """Reads from the tags of a run which process recorded it last; None when they do not say."""
    host, process = tags.get(OWNER_HOST_TAG), tags.get(OWNER_PROCESS_TAG)
    return None if host is None or process is None else ProcessIdentity.from_text(host, process)


def thumbnail(image: bytes) -> bytes:
    """Makes the small image that MLflow's pages show first."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.thumbnail((MAX_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS))
        opened.save(buffer, "WEBP")
    return buffer.getvalue()


def now_ms() -> int:
    """Returns the time of the clock, as MLflow counts it."""
    return time.time_ns() // 1_000_000


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cuts a sequence into pieces of `size` items, the last perhaps shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))
