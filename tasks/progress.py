"""The updates of a training as a progress bar on the page of its Prefect run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

UPDATE = re.compile(r"update (\d+)/(\d+)\b")
"""Start of the line that `sfgrpo.tracking.progress` prints for a finished update."""
PAUSE_S = 5.0
"""Shortest time between two messages to the server."""


class ProgressBar:
    """A progress artifact; a server that is away costs a warning, and never the training."""

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._clock = clock
        self._artifact: UUID | None = None
        self._shown_at = -PAUSE_S
        self._is_away = False

    def show(self, line: str) -> None:
        """Show an update; ignore other lines, and updates within `PAUSE_S` of the last one shown but the very last."""
        if (found := UPDATE.match(line)) is None:
            return
        done, total = int(found[1]), int(found[2])
        if done < total and self._clock() < self._shown_at + PAUSE_S:
            return
        self._shown_at = self._clock()
        try:
            self._send(100.0 * done / total, line)
        except (httpx.HTTPError, PrefectException, OSError) as error:
            if not self._is_away:
                get_run_logger().warning("the bar of the training stands still, the training does not: %s", error)
            self._is_away = True
        else:
            self._is_away = False

    def _send(self, percent: float, line: str) -> None:
        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key, description=line)
            assert isinstance(created, UUID)
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent, description=line)
