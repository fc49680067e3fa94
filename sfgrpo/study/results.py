"""The runs of a study as they lie on the disk; a run is a row trained with one seed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfgrpo.study.metrics import PHASES

Method = Literal["stepwise", "flow_grpo"]
Key = tuple[str, int]
"""Row and seed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Images of R prompts, G of each, before and after training, from the same noise."""

    texts: tuple[str, ...]
    before: NDArray[np.uint8]
    """[R * G, H, W, 3], the images of a prompt next to each other."""
    after: NDArray[np.uint8]
    correct_before: NDArray[np.bool_]
    """Verdicts, [R, G]."""
    correct_after: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished training."""

    row: str
    seed: int
    method: Method
    label: str
    guidance_scale: float
    reward: str
    """Name of the training reward."""
    sampler: str
    num_substeps: int
    """Substeps of a clean estimate, the paper's T'."""
    num_updates: int
    images_per_update: int
    num_steps: int
    params: Mapping[str, Any]
    """Resolved configuration with flat dotted names."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Packages that it trained with."""
    history: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The finished runs of a folder, and why the others do not count."""

    runs: Mapping[Key, Run]
    unusable: Mapping[Key, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeanCurve:
    """Mean and sample standard deviation of a metric over runs, at the updates at which all were evaluated."""

    updates: NDArray[np.float64]
    means: NDArray[np.float64]
    stds: NDArray[np.float64]
    """Zero for a single run."""


def load_results(folder: Path) -> Results:
    """Read every run `<row>/<seed>/` of a folder; list those that are unfinished or damaged as unusable."""
    runs: dict[Key, Run] = {}
    unusable: dict[Key, str] = {}
    for path in sorted(folder.glob("*/*")):
        if path.parent.name.startswith(".") or not path.name.isdigit() or not path.is_dir():
            continue
        key = path.parent.name, int(path.name)
        try:
            runs[key] = _read_run(path, *key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            unusable[key] = _reason(error)
    return Results(runs=runs, unusable=unusable)


def runs_of_row(results: Results, row: str, seeds: Sequence[int]) -> tuple[Run, ...]:
    """Return the finished runs of a row in the order of `seeds`."""
    return tuple(results.runs[row, seed] for seed in seeds if (row, seed) in results.runs)


def mean_curve(runs: Iterable[Run], metric: str) -> MeanCurve | None:
    """Average a metric over the runs that have it, at the updates that all of them have; None if no run has it."""
    values_of_runs = [
        {entry["update"]: entry[metric] for entry in run.evaluations if entry.get(metric) is not None} for run in runs
    ]
    curves = [values for values in values_of_runs if values]
    if not curves:
        return None
    updates = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[update] for update in updates] for curve in curves], dtype=np.float64)
    stds = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(updates))
    return MeanCurve(updates=np.array(updates, dtype=np.float64), means=values.mean(axis=0), stds=stds)


def mean_curves(rows: Mapping[str, Sequence[Run]], metric: str) -> dict[str, MeanCurve]:
    """Average a metric over the runs of every row; rows that do not have it are left out."""
    return {name: curve for name, runs in rows.items() if (curve := mean_curve(runs, metric)) is not None}


def final_values(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """Return a metric at the last evaluation by seed, of the runs that have it."""
    finals = {run.seed: run.evaluations[-1].get(metric) for run in runs}
    return {seed: float(value) for seed, value in finals.items() if value is not None}


def seconds_per_update(runs: Iterable[Run], phases: Sequence[str] = PHASES) -> float:
    """Return the median seconds of an update over updates and runs, in some phases or all; NaN without updates.

    The median ignores the updates during which the machine was busy.
    """
    updates = [entry for run in runs for entry in run.history]
    seconds = [sum(entry.get(f"time/{phase}_s", 0.0) for phase in phases) for entry in updates]
    return statistics.median(seconds) if seconds else math.nan


def _read_run(path: Path, row: str, seed: int) -> Run:
    described = json.loads((path / "run.json").read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(Run)}
    run = Run(
        **{name: value for name, value in described.items() if name in names},
        history=tuple(json.loads((path / "history.json").read_text(encoding="utf-8"))),
        evaluations=tuple(json.loads((path / "evaluations.json").read_text(encoding="utf-8"))),
        samples=_read_samples(path / "samples.npz"),
    )
    if (run.row, run.seed) != (row, seed):
        raise ValueError(f"run.json is of row {run.row!r} and seed {run.seed}")
    done = min(len(run.history), max((int(entry["update"]) for entry in run.evaluations), default=0))
    if done < run.num_updates:
        raise ValueError(f"still running, evaluated at {done} of {run.num_updates} updates")
    return run


def _read_samples(path: Path) -> Samples | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Samples(
            texts=tuple(map(str, arrays["texts"])),
            **{name: arrays[name] for name in ("before", "after", "correct_before", "correct_after")},
        )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name} yet"
    if isinstance(error, KeyError | TypeError | json.JSONDecodeError):
        return f"unreadable: {error}"
    return str(error)
