"""The evaluations of a training: each due one published, done here or aside, and recorded in the order of updates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfgrpo.checkpoint.snapshots import Snapshot, prune_snapshots, publish_snapshot, read_snapshot, snapshot_path
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.store import SAMPLES, claimed_evaluation, read_metrics
from sfgrpo.grpo.distributed import any_of, shared_files
from sfgrpo.policies.base import Policy, use_adapter
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import MANIFEST
from sfgrpo.tracking.base import Tracker

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Between two looks at an evaluation that another process is at."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPaths:
    """Where the evaluations of a training are published, kept and done."""

    folder: Path
    """Of the run: snapshots, the best adapter, sample grids."""
    store: Path
    """Of all evaluations."""
    scope: str
    """Digest of all that shapes an evaluation but the adapter."""
    aside: bool
    """Whether other processes judge while the training goes on; what none of them has begun by its end is done here."""


class PeriodicEvaluation:
    """What the evaluations of one training have come to, and which of them are still awaited.

    Every process of the training has one and calls its methods in the same order; the main process reads and writes
    the files. Results are taken in the order of updates, whoever makes them first, so that nothing depends on it.
    """

    def __init__(
        self,
        policy: Policy,
        court: Evaluator,
        place: EvaluationPaths,
        tracker: Tracker,
        accelerator: Accelerator,
        stop_if_requested: Callable[[], None],
        num_checkpoints: int,
    ) -> None:
        """Takes what is called while it waits, and the number of checkpoints that may be gone back to."""
        self._policy, self._court, self._place = policy, court, place
        self._tracker, self._accelerator, self._heed_notice = tracker, accelerator, stop_if_requested
        self.results: list[dict[str, Any]] = []
        """Update and metrics of every evaluation that was taken."""
        self._awaited: list[Snapshot] = []
        self._needed: deque[frozenset[int]] = deque(maxlen=num_checkpoints)
        """Updates of the snapshots that each of the latest checkpoints awaited."""

    @property
    def best(self) -> dict[str, Any]:
        """The result with the highest GenEval score, the earliest of equals."""
        return max(self.results, key=lambda result: result["metrics"]["geneval/overall"])

    def state(self) -> dict[str, Any]:
        """Gives the JSON values that a checkpoint keeps."""
        return {"evaluations": self.results, "awaited": [dataclasses.asdict(snapshot) for snapshot in self._awaited]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.results = list(state["evaluations"])
        self._awaited = [Snapshot(**snapshot) for snapshot in state["awaited"]]
        self._needed.append(self._awaited_updates())

    def record_again(self) -> None:
        """Records all results, for a tracker that may have missed some before the process died."""
        for result in self.results:
            self._tracker.log_metrics(result["metrics"], result["update"])
            if (path := self._samples_path(result["update"])).exists():
                self._tracker.log_image(path, "samples", result["update"])

    def ask(self, update: int, averaged: AbstractContextManager[None]) -> None:
        """Publishes the adapter that `averaged` puts into the policy, unless it is awaited or was judged."""
        if update in self._awaited_updates() or any(result["update"] == update for result in self.results):
            return
        files: dict[str, bytes] | None = None
        if self._accelerator.is_main_process:
            place = self._place
            with averaged:
                save = self._policy.save_adapter
                snapshot = publish_snapshot(place.folder, update, place.scope, save, self._tracker.run_id)
            files = {"snapshot": json.dumps(dataclasses.asdict(snapshot)).encode()}
        self._awaited.append(Snapshot(**json.loads(shared_files(files, self._accelerator)["snapshot"])))

    def take(self) -> None:
        """Records the awaited results that there are, up to the first that is absent."""
        while self._awaited and (metrics := self._metrics(self._awaited[0])) is not None:
            self._record(self._awaited.pop(0), metrics)

    def advance(self) -> None:
        """Goes on as the place asks: at once where evaluations are done here, else with those that there are."""
        if self._place.aside:
            self.take()
        else:
            self.finish()

    def finish(self) -> None:
        """Takes all awaited results: does what no living process is at, and waits for the rest."""
        self.take()
        while self._awaited:
            if not any(map(self._judge, tuple(self._awaited))):
                self._heed_notice()
                time.sleep(POLL_S)
            self.take()

    def prune(self) -> None:
        """Removes the adapters that no checkpoint awaits any more; called by the main process when it saved one."""
        self._needed.append(self._awaited_updates())
        prune_snapshots(self._place.folder, frozenset[int]().union(*self._needed))

    def _metrics(self, snapshot: Snapshot) -> dict[str, float] | None:
        """Reads a result, on all processes, if the main one finds it."""
        files: dict[str, bytes] | None = None
        if self._accelerator.is_main_process:
            metrics = read_metrics(self._place.store, snapshot.key)
            files = None if metrics is None else {"metrics": json.dumps(metrics).encode()}
        found = shared_files(files, self._accelerator)
        return json.loads(found["metrics"]) if found else None

    def _judge(self, snapshot: Snapshot) -> bool:
        """Makes a result, unless another process is at it or it is there; tells whether it did."""
        place, is_main = self._place, self._accelerator.is_main_process
        with contextlib.ExitStack() as stack:
            claim = is_main and stack.enter_context(claimed_evaluation(place.store, snapshot.key))
            # After the claim: whoever held it until now may have left the result.
            if not any_of(claim, self._accelerator) or self._metrics(snapshot) is not None:
                return False
            files = read_snapshot(place.folder, snapshot.update) if is_main else None
            stack.enter_context(use_adapter(self._policy, shared_files(files, self._accelerator)))
            self._court.judge(self._policy, place.store, snapshot.key, self._accelerator, self._heed_notice)
            return True

    def _record(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """Takes a result: keeps its adapter when it is the best so far, and its samples; records it."""
        place, update = self._place, snapshot.update
        self.results.append({"update": update, "metrics": metrics})
        self._tracker.log_metrics(metrics, update)
        if self._accelerator.is_main_process:
            if self.best is self.results[-1]:
                _keep_best(snapshot_path(place.folder, update), place.folder)
            shutil.copy(place.store / snapshot.key / SAMPLES, self._samples_path(update))
            self._tracker.log_image(self._samples_path(update), "samples", update)
        overall, error = metrics["geneval/overall"], metrics["geneval/overall_stderr"]
        logger.info("update %d: GenEval %.2f ± %.2f", update, overall, error)

    def _awaited_updates(self) -> frozenset[int]:
        return frozenset(snapshot.update for snapshot in self._awaited)

    def _samples_path(self, update: int) -> Path:
        return self._place.folder / f"samples_{update:06d}.png"


def _keep_best(snapshot: Path, folder: Path) -> None:
    with atomic_directory(folder / "best") as partial:
        shutil.copytree(snapshot, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
