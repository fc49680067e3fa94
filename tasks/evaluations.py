"""Evaluations of a training as Prefect tasks: snapshots are evaluated or awaited, and shown, while it runs.

Nothing here delays or fails the training, which itself evaluates what is not evaluated by its end.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from sfgrpo.checkpoint.snapshots import Snapshot, list_snapshots, snapshot_path
from sfgrpo.evaluation.store import EVALUATIONS, is_evaluated, read_metrics
from sfgrpo.paths import TRAINING
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.redaction import without_credentials
from tasks.stages import RETRY_DELAY_S, StageError, run_command, worth_retrying

POLL_S = 1.0
LAST_REPORTS_S = 60.0
"""How long the end of a training waits for its last evaluations to be shown."""
ARTIFACT = "evaluations"


@contextlib.contextmanager
def background_evaluations() -> Iterator[None]:
    """Evaluate and report snapshots in a background thread while the block trains.

    The training is the one that a flow runs in this working directory. Snapshots that were evaluated before the block
    are not shown again.
    """
    TRAINING.unlink(missing_ok=True)
    training_ended = threading.Event()
    # The context tells Prefect to which flow run the tasks of that thread belong.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(_watch, training_ended, time.time()), name="evaluations", daemon=True)
    thread.start()
    try:
        yield
    finally:
        training_ended.set()
        thread.join(LAST_REPORTS_S)


@task(
    name="evaluate-update",
    task_run_name="evaluate update {update}",
    retries=2,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
)
def evaluate_update(folder: str, update: int, training_ended: threading.Event) -> dict[str, float] | None:
    """Evaluate a snapshot on SFGRPO_EVALUATION_DEVICE, or wait until the training has; show and return the metrics.

    Return None if the training ended before there was a result.
    """
    run = Path(folder)
    device = read_environment().evaluation_device
    if device is not None and not training_ended.is_set() and not is_evaluated(_store(run), _snapshot(run, update).key):
        command = [sys.executable, "-m", "sfgrpo", "evaluate-snapshot", folder, str(update)]
        try:
            run_command(f"evaluate-update-{update}", command, {"SFGRPO_DEVICE": device}, stop=training_ended)
        except StageError:
            if not training_ended.is_set():
                raise
    metrics = _wait_for_metrics(run, update, training_ended)
    if metrics is not None:
        create_markdown_artifact(report(run, update), key=ARTIFACT, description=f"Evaluations of {run.name}")
    return metrics


def report(run: Path, update: int) -> str:
    """Return the evaluations of a run up to an update as Markdown, with the place of its samples."""
    snapshots = [snapshot for snapshot in list_snapshots(run) if snapshot.update <= update]
    found = {snapshot.update: read_metrics(_store(run), snapshot.key) for snapshot in snapshots}
    rows = {number: _cells(metrics) for number, metrics in found.items() if metrics is not None}
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [["Update", *names], ["---:"] * (1 + len(names))]
    lines += [[str(number), *(cells.get(name, "") for name in names)] for number, cells in rows.items()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{_mlflow_link(_snapshot(run, update))}\n\nSamples: `{run / f'samples_{update:06d}.png'}`\n"


def _watch(training_ended: threading.Event, started: float) -> None:
    """Report snapshots until the training has ended, and the last ones after that; `started` is the time in seconds."""
    seen: set[tuple[Path, int]] = set()
    try:
        while True:
            is_last = training_ended.is_set()
            for run, update in _unreported(started):
                if (run, update) not in seen:
                    seen.add((run, update))
                    _report(run, update, training_ended)
            if is_last:
                return
            training_ended.wait(POLL_S)
    except Exception:
        get_run_logger().warning("the evaluations are no longer shown; the training goes on", exc_info=True)


def _report(run: Path, update: int, training_ended: threading.Event) -> None:
    try:
        evaluate_update(str(run), update, training_ended)
    except Exception as error:
        get_run_logger().warning("evaluation of update %d is left to the training: %s", update, error)


def _unreported(started: float) -> list[tuple[Path, int]]:
    """List run and update of the snapshots that were published since `started` or are not evaluated yet."""
    if not TRAINING.exists():
        return []
    run = Path(json.loads(TRAINING.read_text(encoding="utf-8"))["folder"])
    return [
        (run, snapshot.update)
        for snapshot in list_snapshots(run)
        if _published(run, snapshot.update) >= started or not is_evaluated(_store(run), snapshot.key)
    ]


def _wait_for_metrics(run: Path, update: int, training_ended: threading.Event) -> dict[str, float] | None:
    while True:
        is_last = training_ended.is_set()
        # A training that resumes may publish another adapter of the same update, so the key is read every time.
        metrics = read_metrics(_store(run), _snapshot(run, update).key)
        if metrics is not None or is_last:
            return metrics
        training_ended.wait(POLL_S)


def _cells(metrics: Mapping[str, float]) -> dict[str, str]:
    """Format the shares of correct images, with standard errors, and the mean rewards."""
    cells: dict[str, str] = {}
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        if f"{name}_stderr" in metrics:
            cells[rest.replace("_", " ").capitalize()] = f"{value:.3f} ± {metrics[f'{name}_stderr']:.3f}"
        elif kind in ("evaluation", "evaluation_noisy"):
            cells[f"{rest}{', noisy' if kind == 'evaluation_noisy' else ''}"] = f"{value:.4f}"
    return cells


def _mlflow_link(snapshot: Snapshot) -> str:
    """Return a link to the MLflow run, or its id if the store is no server; a database URI may hold a password."""
    if snapshot.mlflow_run_id is None:
        return "The MLflow run was not known yet."
    server = without_credentials(read_environment().tracking_uri)
    if not server.startswith(("http://", "https://")):
        return f"MLflow run `{snapshot.mlflow_run_id}`"
    return f"[MLflow run with all curves and samples]({server.rstrip('/')}/#/runs/{snapshot.mlflow_run_id})"


def _snapshot(run: Path, update: int) -> Snapshot:
    return next(snapshot for snapshot in list_snapshots(run) if snapshot.update == update)


def _store(run: Path) -> Path:
    return run.parent / EVALUATIONS


def _published(run: Path, update: int) -> float:
    return snapshot_path(run, update).with_suffix(".json").stat().st_mtime
