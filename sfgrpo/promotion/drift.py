"""Tells whether a model still draws what it drew: its figures today against those that were recorded.

The same weights, prompts and noise give the same images but for rounding, which another machine or another version of a
library does differently: now and then a verdict flips, and nothing else may happen. The standard errors of the figures
say how far they would move with other prompts, so they are shown and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.types import Tag

TOLERANCE = 0.02
"""By how much a figure may move, of a reward that is larger than 1 by which share of it."""
TOLERATED_IMAGES = 2
"""Images of a task whose verdict may flip, however few it has."""


def drift(
    recorded: Mapping[str, float], measured: Mapping[str, float], images_of: Mapping[Tag, int]
) -> tuple[list[str], str]:
    """Compares the figures of two evaluations of one model by one protocol.

    Args:
        recorded: metrics of `Evaluation.to_dict`.
        measured: the same metrics of today.
        images_of: number of judged images of each task.

    Returns:
        One sentence for each figure that moved further than it may, and a table of all in Markdown.
    """
    reasons = []
    lines = [["Figure", "Recorded", "Today", "Moved", "May move"], ["---"] + ["---:"] * 4]
    for key in _figures(recorded):
        before, after = recorded[key], measured[key]
        allowed = tolerance(key, before, images_of)
        error = recorded.get(f"{key}_stderr")
        shown = f"{before:.3f}" if error is None else f"{before:.3f} \N{PLUS-MINUS SIGN} {error:.3f}"
        lines.append([_label(key), shown, f"{after:.3f}", f"{after - before:+.3f}", f"{allowed:.3f}"])
        if abs(after - before) > allowed:
            reasons.append(f"{_label(key)} was {before:.3f} and is {after:.3f}; it may move by {allowed:.3f}")
    return reasons, "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def tolerance(key: str, recorded: float, images_of: Mapping[Tag, int]) -> float:
    """Says by how much a figure may move in either direction."""
    for tag, num_images in images_of.items():
        if key == f"geneval/{tag}":
            return max(TOLERANCE, TOLERATED_IMAGES / num_images)
    return TOLERANCE * max(1.0, abs(recorded))


def _figures(metrics: Mapping[str, float]) -> Sequence[str]:
    """Picks the overall score, the tasks and the rewards, of all metrics of an evaluation."""
    scores = [f"geneval/{name}" for name in ("overall", *COLUMNS) if f"geneval/{name}" in metrics]
    return [*scores, *(key for key in metrics if key.startswith("evaluation/"))]


def _label(key: str) -> str:
    group, _, name = key.partition("/")
    columns = {str(tag): column for tag, column in COLUMNS.items()}
    return f"Reward {name}" if group == "evaluation" else columns.get(name, "Overall")
