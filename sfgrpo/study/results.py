"""What the cells of a study left on the disk: one cell is one experiment, a row, with one seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
class Cell:
    """One finished training."""

    row: str
    seed: int
    method: Method
    label: str
    guidance_scale: float
    reward: str
    """Name of the training reward."""
    sampler: str
    credit: str
    num_substeps: int
    """Substeps of a clean estimate, the paper's T'."""
    num_updates: int
    images_per_update: int
    num_steps: int
    params: Mapping[str, Any]
    """Resolved configuration with flat dotted names."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the packages that it trained with; empty where the cell does not say."""
    history: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The finished cells of a folder, and why the others do not count."""

    folder: Path
    cells: Mapping[Key, Cell]
    unusable: Mapping[Key, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric over the updates at which it was evaluated."""

    updates: NDArray[np.float64]
    values: NDArray[np.float64]


def load_results(folder: Path) -> Results:
    """Reads every cell `<row>/<seed>/` of a folder; one that is still running, or damaged, is named and left out."""
    cells: dict[Key, Cell] = {}
    unusable: dict[Key, str] = {}
    for path in sorted(folder.glob("*/*")):
        if path.parent.name.startswith(".") or not path.name.isdigit() or not path.is_dir():
            continue
        key = path.parent.name, int(path.name)
        try:
            cells[key] = _read_cell(path, *key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            unusable[key] = _reason(error)
    return Results(folder=folder, cells=cells, unusable=unusable)


def cells_of_row(results: Results, row: str, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """Gives the finished cells of a row in the order of `seeds`."""
    return tuple(results.cells[row, seed] for seed in seeds if (row, seed) in results.cells)


def curve_of(cell: Cell, metric: str) -> Curve | None:
    """Gives a metric of the evaluations, None where it was never evaluated."""
    points = [(entry["update"], entry[metric]) for entry in cell.evaluations if entry.get(metric) is not None]
    if not points:
        return None
    updates, values = np.array(points, dtype=np.float64).T
    return Curve(updates=updates, values=values)


def final_value(cell: Cell, metric: str) -> float | None:
    """Gives a metric at the last evaluation, None where that does not have it."""
    value = cell.evaluations[-1].get(metric)
    return None if value is None else float(value)


def _read_cell(path: Path, row: str, seed: int) -> Cell:
    described = json.loads((path / "cell.json").read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(Cell)}
    cell = Cell(
        **{name: value for name, value in described.items() if name in names},
        history=tuple(json.loads((path / "history.json").read_text(encoding="utf-8"))),
        evaluations=tuple(json.loads((path / "evaluations.json").read_text(encoding="utf-8"))),
        samples=_read_samples(path / "samples.npz"),
    )
    if (cell.row, cell.seed) != (row, seed):
        raise ValueError(f"cell.json is of row {cell.row!r} and seed {cell.seed}")
    done = min(len(cell.history), max((int(entry["update"]) for entry in cell.evaluations), default=0))
    if done < cell.num_updates:
        raise ValueError(f"still running, evaluated at {done} of {cell.num_updates} updates")
    return cell


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
