"""Shared style and axes of the study's figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from sfgrpo.study.metrics import PHASES, WINDOW, reach, running_mean, spread
from sfgrpo.study.results import Curve, Run, curve_of
from sfgrpo.study.summary import (
    TARGETS,
    Ratio,
    Unit,
)
from sfgrpo.study.text import counted, ratio

INK = "#22262b"


FAINT = "#6b7280"


GRID = "#e7e9ec"


COLORS = {"flow_grpo": "#5b7c9d", "stepwise": "#d4571e"}


NAMES = {"flow_grpo": "Flow-GRPO", "stepwise": "Stepwise"}


# Warm for rows with stepwise credit and cool for the others, apart in lightness for those who see no hues.
SHADES = {
    "stepwise": ("#d4571e", "#8c2f5e", "#c48a12", "#5a3a22", "#d0708c", "#8a8420", "#a05a46"),
    "flow_grpo": ("#5b7c9d", "#1f3b57", "#9fb8cf", "#3f8f8f"),
}


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


PHASE_COLORS = dict(zip(PHASES, ("#264653", "#2a9d8f", "#9cc5a1", "#e9c46a", "#a394c4"), strict=True))


FRAME = "#00a03c"


WIDTH = 10.0


LINE = 13.0


PLAIN = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}


FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"


STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#b8bec6",
    "axes.labelcolor": FAINT,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#b8bec6",
    "ytick.color": "#b8bec6",
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "sfgrpo",
    "figure.facecolor": "white",
}


def _shrunk(image: NDArray[np.uint8], side: int = 128) -> NDArray[np.uint8]:
    """Averages whole blocks of pixels, so that a large image does not fill the page's file."""
    factor = max(1, image.shape[0] // side)
    height, width = image.shape[0] // factor * factor, image.shape[1] // factor * factor
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), dtype=np.uint8)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _row_of_axes(figure: Figure, count: int) -> list[Axes]:
    return list(np.atleast_1d(figure.subplots(1, count)).flat)


def _curves(runs: Iterable[Run], metric: str) -> list[Curve]:
    return [curve for run in runs if (curve := curve_of(run, metric)) is not None]


def _over_seeds(curves: Sequence[Curve]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Gives updates, mean and standard deviation where all the curves were evaluated; no deviation of one curve."""
    updates = curves[0].updates
    for curve in curves[1:]:
        updates = np.intersect1d(updates, curve.updates)
    values = np.array([curve.values[np.isin(curve.updates, updates)] for curve in curves])
    return updates, values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(updates))


def _band(
    axes: Axes, curves: Sequence[Curve], color: str, *, factor: float = 1.0, marker: str = "", band: float = 0.16
) -> None:
    if not curves:
        return
    updates, means, stds = _over_seeds(curves)
    axes.fill_between(updates * factor, means - stds, means + stds, color=color, alpha=band, linewidth=0)
    axes.plot(updates * factor, means, color=color, linewidth=2.2, zorder=3)
    if marker:
        axes.plot(updates[-1:] * factor, means[-1:], marker, color=color, markersize=7, zorder=4, clip_on=False)


def _running_reward(axes: Axes, runs: Sequence[Run], factor: float) -> None:
    histories = [run.history for run in runs if all("reward/mean" in entry for entry in run.history)]
    if not histories:
        return
    length = min(map(len, histories))
    rewards = [running_mean([entry["reward/mean"] for entry in history[:length]]) for history in histories]
    updates = np.array([entry["update"] for entry in histories[0][:length]], dtype=np.float64)
    points = np.column_stack([updates * factor, np.mean(rewards, axis=0)])
    axes.add_artist(Line2D(*points.T, color=COLORS[runs[0].method], linewidth=0.9, alpha=0.5))
    # The first means are over few updates; their jumps must not stretch the axis.
    axes.update_datalim(points[WINDOW - 1 :])


def _mark_crossing(axes: Axes, rows: Mapping[str, Sequence[Run]], metric: str, factors: Mapping[str, float]) -> None:
    """Draws a line, at the reward where the mean curve of Flow-GRPO ends, between where both mean curves reach it.

    The curves are made rising, as for the ratios, so that a point may lie off a curve that falls.
    """
    curves = {method: _curves(runs, metric) for method, runs in rows.items()}
    if not all(curves.values()):
        return
    means = {method: _over_seeds(of_method)[:2] for method, of_method in curves.items()}
    met = reach(*means["stepwise"], *means["flow_grpo"])
    if met.candidate is None or not met.baseline:
        return
    ends, target = (met.candidate * factors["stepwise"], met.baseline * factors["flow_grpo"]), met.target
    axes.plot(ends, (target, target), color=INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=4)
    for x, method in zip(ends, ("stepwise", "flow_grpo"), strict=True):
        axes.plot(
            x, target, "o", markersize=7, color="white", markeredgecolor=COLORS[method], markeredgewidth=2.0, zorder=5,
            clip_on=False,
        )  # fmt: skip


def _write_ratio(axes: Axes, one: Ratio | None) -> None:
    """Writes the median ratio below the lines, into the corner that a rising curve leaves free."""
    if one is None:
        return
    what: Mapping[Unit, str] = {"updates": "updates", "seconds": "compute time"}
    median = ratio(one.median)
    words = f"{median} of the {what[one.unit]}" if math.isfinite(one.median) else median
    plain: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "bbox": PLAIN, "zorder": 1}
    axes.text(0.98, 0.13, words, weight="bold", size=13, color=COLORS["stepwise"], **plain)
    seeds = counted(len(one.reaches), "seed")
    note = f"target {TARGETS[one.unit]:.2f}" + ("" if len(one.reaches) == 1 else f", median of {seeds}")
    axes.text(0.98, 0.05, note, size=9, color=FAINT, **plain)


def _name_ends(axes: Axes, lines: Sequence[tuple[Sequence[Curve], str, str]]) -> None:
    """Writes the name of every line to the right of its end, moving two that would touch apart."""
    ends = [(*_over_seeds(curves)[:2], name, color) for curves, name, color in lines if curves]
    bottom, top = axes.get_ylim()
    height = axes.bbox.height * 0.7 / (top - bottom) * 72.0 / axes.figure.dpi
    room = min(
        (abs(one[1][-1] - other[1][-1]) * height for one, other in itertools.combinations(ends, 2)), default=LINE
    )
    for place, (updates, means, name, color) in enumerate(sorted(ends, key=lambda end: float(end[1][-1]))):
        shift = 0.0 if len(ends) == 1 else (place - 0.5) * max(0.0, LINE - room)
        axes.annotate(
            name, (updates[-1], means[-1]), (8, shift), textcoords="offset points", color=color, weight="bold",
            va="center", annotation_clip=False,
        )  # fmt: skip


def _dots(axes: Axes, place: float, values: Iterable[float], color: str, marker: str) -> None:
    known = list(values)
    if not known:
        return
    one = spread(known)
    axes.plot(known, [place] * len(known), marker, color="white", markeredgecolor=color, markersize=5, zorder=3)
    if not math.isnan(one.std):
        axes.plot((one.mean - one.std, one.mean + one.std), (place, place), color=color, linewidth=1.6, zorder=2)
    axes.plot(one.mean, place, marker, color=color, markersize=9, alpha=0.9, zorder=2)


def _looks(methods: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Gives every row a colour of its method and a marker of its own."""
    used = dict.fromkeys(SHADES, 0)
    for place, method in enumerate(methods):
        shades = SHADES[method]
        yield shades[used[method] % len(shades)], MARKERS[place % len(MARKERS)]
        used[method] += 1
