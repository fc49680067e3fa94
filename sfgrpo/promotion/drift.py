"""Drift: whether a model still has the metrics that were recorded when it was promoted.

The same weights, prompts and noise give the same images but for rounding, which differs between machines and versions
of libraries: now and then a verdict flips, and nothing else may change. The standard errors say how far the metrics
would move with other prompts, so they are shown and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.types import Tag

TOLERANCE = 0.02
"""By how much a metric may change; relative for a reward that is larger than 1."""
TOLERATED_IMAGES = 2
"""Images of a task whose verdict may flip, however few it has."""


def drift(
    recorded: Mapping[str, float], measured: Mapping[str, float], images_of: Mapping[Tag, int]
) -> tuple[list[str], str]:
    """Compare the metrics of two evaluations of one model by one protocol.

    Args:
        recorded: Metrics of `Evaluation.to_dict`.
        measured: The same metrics of today.
        images_of: Number of images of each task.

    Returns:
        One sentence for each metric that changed by more than its tolerance, and a table of all in Markdown.
    """
    labels = {"geneval/overall": "Overall", **{f"geneval/{tag}": column for tag, column in COLUMNS.items()}}
    labels |= {key: f"Reward {key.partition('/')[2]}" for key in recorded if key.startswith("evaluation/")}
    reasons = []
    lines = [["Metric", "Recorded", "Today", "Change", "Tolerance"], ["---"] + ["---:"] * 4]
    for key in filter(recorded.__contains__, labels):
        before, after = recorded[key], measured[key]
        allowed = tolerance(key, before, images_of)
        stderr = recorded.get(f"{key}_stderr")
        shown = f"{before:.3f}" if stderr is None else f"{before:.3f} \N{PLUS-MINUS SIGN} {stderr:.3f}"
        lines.append([labels[key], shown, f"{after:.3f}", f"{after - before:+.3f}", f"{allowed:.3f}"])
        if abs(after - before) > allowed:
            reasons.append(f"{labels[key]} was {before:.3f} and is {after:.3f}; it may change by {allowed:.3f}")
    return reasons, "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def tolerance(key: str, recorded: float, images_of: Mapping[Tag, int]) -> float:
    """Return by how much a metric may change in either direction."""
    for tag, num_images in images_of.items():
        if key == f"geneval/{tag}":
            return max(TOLERANCE, TOLERATED_IMAGES / num_images)
    return TOLERANCE * max(1.0, abs(recorded))
