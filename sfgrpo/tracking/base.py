"""What it takes to record a run, and two trackers that need no store: one for tests, one that records nothing."""

from __future__ import annotations

import abc
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sfgrpo.config.stages import flatten
from sfgrpo.errors import Preempted
from sfgrpo.runtime.manifest import sha256_of_file

RunStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(abc.ABC):
    """Records one run: what it was told, what it measured, what it made.

    A call returns before its record is delivered, so an outage of the store stops nobody; what the store refuses for
    good is raised by a later call.

    A run that is tracked again after a crash goes on where it stopped: a metric or an image whose step was already
    recorded is left out. Whoever resumes a run may therefore record its whole history again, and what was lost on the
    way is filled in.
    """

    @property
    @abc.abstractmethod
    def run_id(self) -> str | None:
        """Names the run; None until the store has it."""

    @abc.abstractmethod
    def open(self) -> None:
        """Waits until the store has the run and all that was recorded so far; raises `TrackingError` if it is away.

        Called at the start of a run that is new, so that nothing expensive is done for a store that is not there.
        """

    @abc.abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters; nested mappings become dotted names."""

    @abc.abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers at an update; the updates of a key ascend."""

    @abc.abstractmethod
    def log_image(self, path: Path, key: str, step: int) -> None:
        """Records a PNG file as the state of `key` at an update; the file may go when the call returns."""

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
        """Delivers what is left and ends the run; does nothing if nothing was recorded.

        Raises `TrackingError` if a FINISHED run is not recorded in full; one that ended otherwise is only warned about.
        """


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

    def open(self) -> None:
        pass

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= param_texts(params)

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


class SilentTracker(Tracker):
    """Records nothing: for all processes of a distributed run but the one that records."""

    @property
    def run_id(self) -> None:
        return None

    def open(self) -> None:
        pass

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_image(self, path: Path, key: str, step: int) -> None:
        pass

    def log_text(self, text: str, name: str) -> None:
        pass

    def log_prompts(self, path: Path, name: str, context: Literal["training", "evaluation"]) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def finish(self, status: RunStatus) -> None:
        pass


@contextlib.contextmanager
def ending(tracker: Tracker) -> Iterator[Tracker]:
    """Ends the run of `tracker` with the block: FINISHED, FAILED by an error, KILLED when it was told to stop.

    MLflow itself leaves the run of a process that was told to stop as RUNNING for ever. A signal has to arrive as an
    exception; `sigterm_as_exit` makes SIGTERM one.
    """
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit, Preempted):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters by dotted name, each as the text that `params.yaml` would hold."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(params).items()}
