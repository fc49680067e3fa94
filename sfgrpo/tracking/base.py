"""Interface of run trackers, and a tracker that logs nothing."""

from __future__ import annotations

import abc
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sfgrpo.config.stages import flatten

RunStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]
PromptUse: TypeAlias = Literal["training", "validation", "evaluation"]
PROMPT_USES: tuple[PromptUse, ...] = get_args(PromptUse)


class Tracker(abc.ABC):
    """Logs parameters, metrics and artifacts of one run.

    Calls return before the record is delivered, so an outage of the store blocks nothing; a record that the store
    refuses is raised by a later call.

    A resumed run may log its whole history again: metrics and images of steps that the store already has are skipped,
    and what a crash had lost is filled in.
    """

    @property
    @abc.abstractmethod
    def run_id(self) -> str | None:
        """The id of the run; None until the store has it."""

    @abc.abstractmethod
    def open(self) -> None:
        """Wait until every record is delivered; raise `TrackingError` if the store does not answer.

        Call this at the start of a new run, before anything expensive is computed for a store that is unreachable.
        """

    @abc.abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become dotted names."""

    @abc.abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at an update; the steps of a metric must ascend."""

    @abc.abstractmethod
    def log_image(self, path: Path, key: str, step: int) -> None:
        """Log a PNG file under `key` at an update; the file may be removed when the call returns."""

    @abc.abstractmethod
    def log_text(self, text: str, name: str) -> None:
        """Log a text, such as a Markdown table, as the file `name`, replacing an earlier one."""

    @abc.abstractmethod
    def log_prompts(self, path: Path, name: str, context: PromptUse) -> None:
        """Log a prompt file as an input data set, identified by its digest."""

    @abc.abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""

    @abc.abstractmethod
    def finish(self, status: RunStatus) -> None:
        """Deliver the remaining records and end the run; do nothing if nothing was logged.

        Raises:
            TrackingError: a FINISHED run is not recorded in full. For any other status that is only a warning.
        """


class SilentTracker(Tracker):
    """Logs nothing: for all processes of a distributed run but the first."""

    @property
    def run_id(self) -> None: ...
    def open(self) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_image(self, path: Path, key: str, step: int) -> None: ...
    def log_text(self, text: str, name: str) -> None: ...
    def log_prompts(self, path: Path, name: str, context: PromptUse) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def finish(self, status: RunStatus) -> None: ...


@contextlib.contextmanager
def ending(tracker: Tracker) -> Iterator[Tracker]:
    """End the run of `tracker` with the block: FINISHED, FAILED after an error, KILLED when told to stop.

    MLflow alone would leave the run of a process that was told to stop RUNNING for ever. A signal has to arrive as an
    exception, as within `GracefulShutdown`.
    """
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters by dotted name, each as the text that `params.yaml` would hold."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(params).items()}
