"""GenEval as the paper prints it: Savani et al., CVPR 2026, arXiv:2603.28718."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sfgrpo.types import TAGS, Tag

Column = Literal["overall"] | Tag


def _row(overall: float, *tasks: float) -> Mapping[Column, float]:
    row: dict[Column, float] = {"overall": overall}
    return row | (dict(zip(TAGS, tasks, strict=True)) if tasks else {})


PAPER: Mapping[str, Mapping[Column, float]] = {
    "SD3.5-M cfg 1.0": _row(0.28, 0.71, 0.23, 0.15, 0.45, 0.05, 0.08),
    "SD3.5-M cfg 4.5": _row(0.63, 0.98, 0.78, 0.50, 0.81, 0.24, 0.52),
    "Flow-GRPO cfg 1.0 PickScore": _row(0.60, 0.96, 0.73, 0.67, 0.67, 0.21, 0.35),
    "Stepwise cfg 1.0 PickScore": _row(0.60, 0.96, 0.75, 0.67, 0.67, 0.21, 0.34),
    "Flow-GRPO cfg 4.5 PickScore": _row(0.68, 0.98, 0.82, 0.64, 0.82, 0.24, 0.59),
    "Stepwise cfg 4.5 PickScore": _row(0.71, 0.98, 0.85, 0.70, 0.82, 0.29, 0.59),
    "Flow-GRPO cfg 4.5 GenEval, 400 GPU h": _row(0.72),
    "Stepwise cfg 4.5 UnifiedReward, 60 GPU h": _row(0.74, 0.99, 0.89, 0.73, 0.83, 0.34, 0.66),
    "Stepwise cfg 4.5 GenEval, 400 GPU h": _row(0.87, 0.99, 0.93, 0.89, 0.87, 0.73, 0.80),
    "Janus-Pro-7B": _row(0.80, 0.99, 0.89, 0.59, 0.90, 0.79, 0.66),
    "SANA-1.5 4.8B": _row(0.81, 0.99, 0.93, 0.86, 0.84, 0.59, 0.65),
    "GPT-4o": _row(0.84, 0.99, 0.92, 0.85, 0.92, 0.75, 0.61),
}


def paper_row(name: str) -> Mapping[Column, float]:
    """Return a row of the paper's table; raise `ValueError` with the rows that it has if there is none."""
    if name not in PAPER:
        raise ValueError(f"the paper has no row {name!r}; it has {', '.join(map(repr, PAPER))}")
    return PAPER[name]


def paper_base(name: str) -> str | None:
    """Return the name of the untrained model of a row: the one with the same guidance."""
    return next((base for base in PAPER if base.startswith("SD3.5-M") and f" {base[8:]} " in f" {name} "), None)
