"""Style of the study's figures, and what several of them draw on their axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from sfgrpo.study.metrics import PHASES, WINDOW, reach, running_mean, spread
from sfgrpo.study.results import MeanCurve, Run
from sfgrpo.study.summary import TARGETS, Ratio, Unit
from sfgrpo.study.text import ratio

WIDTH = 10.0
"""Width of a figure in inches."""
LINE = 13.0
"""Height of a line of text in points."""
INK = "#22262b"
FAINT = "#6b7280"
FRAME = "#00a03c"
"""Frame of a correct image."""
NAMES = {"flow_grpo": "Flow-GRPO", "stepwise": "Stepwise"}
COLORS = {"flow_grpo": "#5b7c9d", "stepwise": "#d4571e"}
# Warm for rows with stepwise credit and cool for the others, apart in lightness for those who see no hues.
SHADES = {
    "stepwise": ("#d4571e", "#8c2f5e", "#c48a12", "#5a3a22", "#d0708c", "#8a8420", "#a05a46"),
    "flow_grpo": ("#5b7c9d", "#1f3b57", "#9fb8cf", "#3f8f8f"),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PHASE_COLORS = dict(zip(PHASES, ("#264653", "#2a9d8f", "#9cc5a1", "#e9c46a", "#a394c4"), strict=True))
BACKED = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
"""Box behind text that lies on lines."""
FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
STYLE: dict[Any, Any] = {
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
    "grid.color": "#e7e9ec",
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


def shrunk(image: NDArray[np.uint8], side: int = 128) -> NDArray[np.uint8]:
    """Average whole blocks of pixels, so that a large image does not fill the page's file."""
    factor = max(1, image.shape[0] // side)
    height, width = image.shape[0] // factor * factor, image.shape[1] // factor * factor
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), dtype=np.uint8)


def looks_of(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return a colour of its method and a marker of its own for every row."""
    used = dict.fromkeys(SHADES, 0)
    looks = []
    for place, method in enumerate(methods):
        shades = SHADES[method]
        looks.append((shades[used[method] % len(shades)], MARKERS[place % len(MARKERS)]))
        used[method] += 1
    return looks


def draw_band(
    axes: Axes, curve: MeanCurve, color: str, *, factor: float = 1.0, marker: str = "", alpha: float = 0.16
) -> None:
    """Draw a mean with one standard deviation around it; `factor` scales the updates."""
    x, means = curve.updates * factor, curve.means
    axes.fill_between(x, means - curve.stds, means + curve.stds, color=color, alpha=alpha, linewidth=0)
    axes.plot(x, means, color=color, linewidth=2.2, zorder=3)
    if marker:
        axes.plot(x[-1:], means[-1:], marker, color=color, markersize=7, zorder=4, clip_on=False)


def draw_running_reward(axes: Axes, runs: Sequence[Run], factor: float) -> None:
    """Draw the running mean of the rewards trained on, averaged over runs, as a thin line."""
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


def mark_crossing(axes: Axes, curves: Mapping[str, MeanCurve], factors: Mapping[str, float]) -> None:
    """Connect where both mean curves reach the reward at which Flow-GRPO's ends.

    The curves are made monotone, as for the ratios, so that a point may lie off a curve that falls.
    """
    if len(curves) < 2:
        return
    stepwise, flow_grpo = curves["stepwise"], curves["flow_grpo"]
    met = reach(stepwise.updates, stepwise.means, flow_grpo.updates, flow_grpo.means)
    if met.candidate is None or not met.baseline:
        return
    ends = {"stepwise": met.candidate * factors["stepwise"], "flow_grpo": met.baseline * factors["flow_grpo"]}
    axes.plot(list(ends.values()), [met.target] * 2, color=INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=4)
    ring: dict[str, Any] = {"markersize": 7, "color": "white", "markeredgewidth": 2.0, "zorder": 5, "clip_on": False}
    for method, x in ends.items():
        axes.plot(x, met.target, "o", markeredgecolor=COLORS[method], **ring)


def write_ratio(axes: Axes, measured: Ratio | None) -> None:
    """Write the median ratio into the lower right corner, which a rising curve leaves free."""
    if measured is None:
        return
    what: Mapping[Unit, str] = {"updates": "updates", "seconds": "compute time"}
    median = ratio(measured.median)
    text = f"{median} of the {what[measured.unit]}" if math.isfinite(measured.median) else median
    note = f"target {TARGETS[measured.unit]:.2f}, median over seeds"
    options: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "bbox": BACKED, "zorder": 1}
    axes.text(0.98, 0.13, text, weight="bold", size=13, color=COLORS["stepwise"], **options)
    axes.text(0.98, 0.05, note, size=9, color=FAINT, **options)


def name_ends(axes: Axes, curves: Mapping[str, MeanCurve]) -> None:
    """Write each method's name to the right of its curve's end, moving two names that would touch apart."""
    ends = sorted((float(curve.means[-1]), float(curve.updates[-1]), method) for method, curve in curves.items())
    bottom, top = axes.get_ylim()
    height = axes.bbox.height * 0.7 / (top - bottom) * 72.0 / axes.figure.dpi
    room = min((abs(first[0] - second[0]) * height for first, second in itertools.combinations(ends, 2)), default=LINE)
    for place, (mean, update, method) in enumerate(ends):
        shift = 0.0 if len(ends) == 1 else (place - 0.5) * max(0.0, LINE - room)
        axes.annotate(
            NAMES[method], (update, mean), (8, shift), textcoords="offset points", color=COLORS[method], weight="bold",
            va="center", annotation_clip=False,
        )  # fmt: skip


def draw_seeds(axes: Axes, place: float, values: Sequence[float], color: str, marker: str) -> None:
    """Draw the values of all seeds on a horizontal line, with their mean and standard deviation."""
    if not values:
        return
    over_seeds = spread(values)
    axes.plot(values, [place] * len(values), marker, color="white", markeredgecolor=color, markersize=5, zorder=3)
    if not math.isnan(over_seeds.std):
        ends = (over_seeds.mean - over_seeds.std, over_seeds.mean + over_seeds.std)
        axes.plot(ends, (place, place), color=color, linewidth=1.6, zorder=2)
    axes.plot(over_seeds.mean, place, marker, color=color, markersize=9, alpha=0.9, zorder=2)
