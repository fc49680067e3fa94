"""Tracker for MLflow that survives outages of the server and logs every step once."""

from __future__ import annotations

import functools
import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfgrpo.errors import ConfigError, TrackingError
from sfgrpo.runtime.lines import read_lines
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.runtime.redaction import without_credentials
from sfgrpo.tracking.base import PromptUse, RunStatus, Tracker, param_texts
from sfgrpo.tracking.delivery import DeliveryQueue, first_line
from sfgrpo.tracking.mlflow_client import is_outage, load_mlflow
from sfgrpo.tracking.mlflow_run import MlflowRun

logger = logging.getLogger(__name__)

MAX_PARAM_LENGTH = 6000
MAX_THUMBNAIL_PIXELS = 256
OPEN_S = 60.0
"""A server takes half a minute to start."""
FLUSH_S: Mapping[RunStatus, float] = {"FINISHED": 300.0, "FAILED": 30.0, "KILLED": 5.0}
"""Seconds to wait for deliveries at the end of a run; a resumed run delivers what is missing from its history."""


class MlflowTracker(Tracker):
    """Logs to MLflow through a delivery queue, whose thread alone makes the requests.

    The run is created by the first record, so that a skipped stage leaves none.
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
        """Connect to nothing yet.

        Args:
            run_id: an earlier run to reopen.
            key: identifies the work, such as a digest of everything that shapes it; without `run_id`, an earlier run
                with the same key is reopened.
        """
        self._address = without_credentials(uri)
        self._run = MlflowRun(
            uri=uri,
            experiment=experiment,
            run_name=run_name,
            wanted_run_id=run_id,
            key=uuid.uuid4().hex if key is None else key,
            parent_run_id=parent_run_id,
        )
        self._queue = DeliveryQueue(f"MLflow at {self._address}", is_outage)

    @property
    def run_id(self) -> str | None:
        return self._run.run_id

    def open(self) -> None:
        self._put(self._run.open)
        num_left = len(self._queue)
        while not self._queue.wait_until_empty(time.monotonic() + OPEN_S):
            # A backlog may take longer than `OPEN_S`, as long as it shrinks.
            num_before, num_left = num_left, len(self._queue)
            if num_left == num_before:
                reason = first_line(self._queue.outage or TimeoutError(f"no answer in {OPEN_S:g} s"))
                self._queue.clear()
                raise TrackingError(
                    f"MLFLOW_TRACKING_URI {self._address} does not answer ({reason}); "
                    "start the server there, or unset the variable to record to a file"
                )
        self._raise_refusal()

    def log_params(self, params: Mapping[str, Any]) -> None:
        texts = {key: text[:MAX_PARAM_LENGTH] for key, text in param_texts(params).items()}
        self._put(functools.partial(self._run.log_params, texts))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        self._put(functools.partial(self._run.log_metrics, values, step, time.time_ns() // 1_000_000))

    def log_image(self, path: Path, key: str, step: int) -> None:
        # Read now: the file may be gone by the time the server is back.
        image = path.read_bytes()
        # MLflow's pages find key, step and time of an image in its name.
        prefix = f"{key.replace('/', '~')}+step+{step}+timestamp+"
        stem = f"{prefix}{time.time_ns() // 1_000_000}+{uuid.uuid4()}"
        self._put(functools.partial(self._run.log_image, image, _thumbnail(image), prefix, stem))

    def log_text(self, text: str, name: str) -> None:
        self._put(functools.partial(self._run.log_text, text, name))

    def log_prompts(self, path: Path, name: str, context: PromptUse) -> None:
        fields = {
            "name": name,
            "digest": sha256_of_file(path)[:16],
            "source_type": "local",
            "source": json.dumps({"uri": str(path)}),
            "profile": json.dumps({"num_rows": len(read_lines(path))}),
        }
        self._put(functools.partial(self._run.log_dataset, fields, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put(functools.partial(self._run.set_tags, dict(tags)))

    def finish(self, status: RunStatus) -> None:
        if self.run_id is None and not self._queue:
            return
        deadline = time.monotonic() + FLUSH_S[status]
        if self._queue.outage is not None:
            logger.warning("waiting up to %g s for MLflow at %s to end the run", FLUSH_S[status], self._address)
        self._queue.wait_until_empty(deadline)
        refusal = self._queue.take_refusal()
        # Queued even during an outage, which may be over before the process ends.
        self._queue.put(functools.partial(self._run.end, "FAILED" if refusal and status == "FINISHED" else status))
        delivered = self._queue.wait_until_empty(deadline)
        refusal = refusal or self._queue.take_refusal()
        if refusal is None and delivered:
            return
        problem = self._refused(refusal) if refusal else self._undelivered(FLUSH_S[status])
        if status == "FINISHED":
            raise TrackingError(problem) from refusal
        logger.warning("%s", problem)

    def _put(self, send: Callable[[], object]) -> None:
        self._raise_refusal()
        # In the caller's thread, because two threads that import MLflow at once can deadlock.
        load_mlflow()
        self._queue.put(send)

    def _raise_refusal(self) -> None:
        refusal = self._queue.take_refusal()
        if isinstance(refusal, ConfigError):
            raise refusal
        if refusal is not None:
            raise TrackingError(self._refused(refusal)) from refusal

    def _refused(self, refusal: Exception) -> str:
        reason = first_line(refusal)
        return f"MLflow at {self._address} refuses to record the run ({reason}); fix that and start the run again"

    def _undelivered(self, waited_s: float) -> str:
        reason = "" if self._queue.outage is None else f" ({first_line(self._queue.outage)})"
        return (
            f"MLflow at {self._address} did not take {len(self._queue)} records of the run within {waited_s:g} s"
            f"{reason}; start the run again when it is back, and it records what is missing"
        )


def _thumbnail(image: bytes) -> bytes:
    """Return the small WebP image that MLflow's pages show first."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.thumbnail((MAX_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS))
        opened.save(buffer, "WEBP")
    return buffer.getvalue()
