"""The evaluations of a training: published when due, done here or in the background, recorded in order of updates."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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

from sfgrpo.checkpoint.snapshots import (
    Snapshot,
    prune_snapshots,
    publish_snapshot,
    read_snapshot,
    record_snapshot,
    snapshot_path,
)
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.store import SAMPLES, claimed_evaluation, read_metrics
from sfgrpo.grpo.distributed import any_of, shared_files
from sfgrpo.policies.base import Policy, use_adapter
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import MANIFEST
from sfgrpo.tracking.base import Tracker

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Pause between two looks at an evaluation that another process is doing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPaths:
    """Where a training publishes, keeps and does its evaluations."""

    folder: Path
    """Folder of the run: checkpoints, snapshots, the best adapter, sample grids."""
    store: Path
    """Evaluations of all runs."""
    fingerprint: str
    """Digest of all that shapes an evaluation but the adapter."""
    in_background: bool = False
    """Whether other processes evaluate while the training goes on; what none has begun by its end is done here."""


class PeriodicEvaluation:
    """The results of a training's evaluations, and the snapshots whose evaluation is pending.

    Every process of the training has one and calls its methods in the same order; the main process reads and writes
    the files. Results are taken in the order of updates, whichever is done first, so that nothing depends on timing.
    """

    def __init__(
        self,
        policy: Policy,
        evaluator: Evaluator,
        paths: EvaluationPaths,
        tracker: Tracker,
        accelerator: Accelerator,
        stop_if_requested: Callable[[], None],
        num_checkpoints: int,
    ) -> None:
        """Take what to call while it waits, and the number of checkpoints that a run may go back to."""
        self._policy, self._evaluator, self._paths = policy, evaluator, paths
        self._tracker, self._accelerator, self._stop_if_requested = tracker, accelerator, stop_if_requested
        self.results: list[dict[str, Any]] = []
        """Update and metrics of every evaluation so far."""
        self._pending: list[Snapshot] = []
        self._needed: deque[frozenset[int]] = deque(maxlen=num_checkpoints)
        """Updates of the snapshots that were pending at each of the latest checkpoints."""

    @property
    def best(self) -> dict[str, Any]:
        """The result with the highest `Evaluator.selected_by`; of equals the earliest that was trained at all."""
        metric = self._evaluator.selected_by
        return max(self.results, key=lambda result: (result["metrics"][metric], result["update"] > 0))

    def state(self) -> dict[str, Any]:
        """Return the JSON values that a checkpoint keeps."""
        return {"evaluations": self.results, "pending": [snapshot.update for snapshot in self._pending]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.results = list(state["evaluations"])
        for update in state["pending"]:
            # Recorded again, because the run may go on with other code, and then its evaluations have other keys.
            self._add(functools.partial(record_snapshot, self._paths.folder, update, *self._identity()))
        self._needed.append(self._pending_updates())

    def record_again(self) -> None:
        """Record all results again, for a tracker that may have missed some before the process died."""
        for result in self.results:
            self._tracker.log_metrics(result["metrics"], result["update"])
            if (path := self._samples_path(result["update"])).exists():
                self._tracker.log_image(path, "samples", result["update"])

    def request(self, update: int, averaged: AbstractContextManager[None]) -> None:
        """Publish the adapter that `averaged` puts into the policy, unless it is pending or evaluated."""
        if update in self._pending_updates() or any(result["update"] == update for result in self.results):
            return

        def publish() -> Snapshot:
            with averaged:
                return publish_snapshot(self._paths.folder, update, *self._identity(), self._policy.save_adapter)

        self._add(publish)

    def take(self) -> None:
        """Record the pending results that are there, up to the first that is not."""
        while self._pending and (metrics := self._metrics(self._pending[0])) is not None:
            self._record(self._pending.pop(0), metrics)

    def advance(self) -> None:
        """Take the results that are there; without background evaluation, evaluate at once."""
        if self._paths.in_background:
            self.take()
        else:
            self.finish()

    def finish(self) -> None:
        """Take all pending results: evaluate what no living process is doing, and wait for the rest."""
        self.take()
        while self._pending:
            if not any(map(self._evaluate, tuple(self._pending))):
                self._stop_if_requested()
                time.sleep(POLL_S)
            self.take()

    def prune(self) -> None:
        """Remove the adapters that are pending at no checkpoint; called by the main process after saving one."""
        self._needed.append(self._pending_updates())
        prune_snapshots(self._paths.folder, frozenset[int]().union(*self._needed))

    def _add(self, publish: Callable[[], Snapshot]) -> None:
        """Have the main process publish a snapshot, and all processes wait for its evaluation."""
        self._pending.append(Snapshot(**self._from_main(lambda: dataclasses.asdict(publish()))))

    def _identity(self) -> tuple[str, str | None]:
        return self._paths.fingerprint, self._tracker.run_id

    def _metrics(self, snapshot: Snapshot) -> dict[str, float] | None:
        """Return a result, on all processes, if the main one finds it."""
        metrics: dict[str, float] | None = self._from_main(lambda: read_metrics(self._paths.store, snapshot.key))
        return metrics

    def _from_main(self, call: Callable[[], Any]) -> Any:
        """Return, on all processes, the JSON value that `call` returns on the main one."""
        files = {"value": json.dumps(call()).encode()} if self._accelerator.is_main_process else None
        return json.loads(shared_files(files, self._accelerator)["value"])

    def _evaluate(self, snapshot: Snapshot) -> bool:
        """Evaluate a snapshot unless another process is doing so or the result is there; return whether it did."""
        paths, is_main = self._paths, self._accelerator.is_main_process
        with contextlib.ExitStack() as stack:
            claim = is_main and stack.enter_context(claimed_evaluation(paths.store, snapshot.key))
            # After the claim: whoever held it until now may have left the result.
            if not any_of(claim, self._accelerator) or self._metrics(snapshot) is not None:
                return False
            files = read_snapshot(paths.folder, snapshot.update) if is_main else None
            stack.enter_context(use_adapter(self._policy, shared_files(files, self._accelerator)))
            self._evaluator.evaluate(
                self._policy, paths.store, snapshot.key, self._accelerator, self._stop_if_requested
            )
            return True

    def _record(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """Record a result; keep its samples, and its adapter when it is the best so far."""
        paths, update = self._paths, snapshot.update
        self.results.append({"update": update, "metrics": metrics})
        self._tracker.log_metrics(metrics, update)
        if self._accelerator.is_main_process:
            if self.best is self.results[-1]:
                with atomic_directory(paths.folder / "best") as partial:
                    adapter, all_but_manifest = snapshot_path(paths.folder, update), shutil.ignore_patterns(MANIFEST)
                    shutil.copytree(adapter, partial, dirs_exist_ok=True, ignore=all_but_manifest)
            shutil.copy(paths.store / snapshot.key / SAMPLES, self._samples_path(update))
            self._tracker.log_image(self._samples_path(update), "samples", update)
        overall, error = metrics["geneval/overall"], metrics["geneval/overall_stderr"]
        reward = metrics[self._evaluator.selected_by]
        logger.info("update %d: reward %.3f, GenEval %.2f ± %.2f", update, reward, overall, error)

    def _pending_updates(self) -> frozenset[int]:
        return frozenset(snapshot.update for snapshot in self._pending)

    def _samples_path(self, update: int) -> Path:
        return self._paths.folder / f"samples_{update:06d}.png"
