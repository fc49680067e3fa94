"""The figures of a study: one colour for each method, bands over seeds, names at the lines instead of legends."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sfgrpo.study.measures import PHASES, WINDOW, gain_magnitudes, reach, running_mean, spread
from sfgrpo.study.results import Cell, Curve, Results, curve_of
from sfgrpo.study.summary import (
    PREFIXES,
    TARGETS,
    AblationSummary,
    Cost,
    PairSummary,
    Ratio,
    Summary,
    Unit,
    seconds_per_update,
    summarise,
)
from sfgrpo.study.words import TIMES, counted, ratio, reward_name

if TYPE_CHECKING:
    from sfgrpo.study.plan import Plan

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


def figures_of(plan: Plan, results: Results) -> dict[str, Figure]:
    """Draws every figure that the results allow, by name."""
    return draw(summarise(plan, results))


def draw(summary: Summary) -> dict[str, Figure]:
    """Draws every figure of a measured study, by name."""
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for pair in summary.pairs:
            name = slug(pair.pair.title)
            figures[f"reward_{name}"] = _reward_figure(pair)
            figures[f"quality_{name}"] = _quality_figure(pair)
            figures[f"samples_{name}"] = _samples_figure(pair)
        figures["gains"] = _gains_figure(summary.pairs)
        for ablation in summary.ablations:
            figures[f"ablation_{slug(ablation.ablation.title)}"] = _ablation_figure(ablation)
        figures["cost"] = _cost_figure(summary.costs)
    return {name: figure for name, figure in figures.items() if figure is not None}


def svg_of(figure: Figure) -> str:
    """Gives a figure as SVG whose text stays text, in fonts that are everywhere; the same figure is the same text."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(file, format="svg", metadata={"Date": None})
    return re.sub(r"'DejaVu Sans'(, [^;\"]*)?(?=[;\"])", FONTS, file.getvalue())


def slug(title: str) -> str:
    """Makes a title fit for a file name."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def _reward_figure(pair: PairSummary) -> Figure | None:
    if not pair.flow_grpo and not pair.stepwise:
        return None
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    metric = f"{PREFIXES['noisy']}/{(pair.flow_grpo or pair.stepwise)[0].reward}"
    rows = {"flow_grpo": pair.flow_grpo, "stepwise": pair.stepwise}
    paces = {method: seconds_per_update(cells) for method, cells in rows.items() if cells}
    longest = max(pace * rows[method][0].num_updates for method, pace in paces.items())
    scale, unit_name = (
        (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 10_800 else (3600.0, "hours")
    )
    for axes, unit in ((left, "updates"), (right, "seconds")):
        for method, cells in rows.items():
            if cells:
                factor = 1.0 if unit == "updates" else paces[method] / scale
                _running_reward(axes, cells, factor)
                _band(axes, _curves(cells, metric), COLORS[method], factor=factor)
        _mark_crossing(axes, rows, metric, {m: 1.0 if unit == "updates" else pace / scale for m, pace in paces.items()})
        _write_ratio(axes, pair.ratio("noisy", "updates" if unit == "updates" else "seconds"))
    left.set_title(f"{reward_name(metric.split('/')[1])} reward, training sampler")
    left.set_xlabel("updates")
    right.set_xlabel(f"{unit_name} of compute")
    _name_ends(left, [(_curves(cells, metric), NAMES[method], COLORS[method]) for method, cells in rows.items()])
    return figure


def _quality_figure(pair: PairSummary) -> Figure | None:
    cells = (*pair.flow_grpo, *pair.stepwise)
    if not cells:
        return None
    reward = cells[0].reward
    panels = {f"evaluation/{reward}": f"{reward_name(reward)} reward, noise-free", "geneval/overall": "GenEval overall"}
    if reward != "likeness":
        panels["evaluation/likeness"] = "Likeness, never trained on"
    panels = {metric: title for metric, title in panels.items() if _curves(cells, metric)}
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    rows = {"flow_grpo": pair.flow_grpo, "stepwise": pair.stepwise}
    for axes, (metric, title) in zip(_row_of_axes(figure, len(panels)), panels.items(), strict=True):
        for method, members in rows.items():
            _band(axes, _curves(members, metric), COLORS[method])
        axes.set_title(title)
        axes.set_xlabel("updates")
        if metric == next(iter(panels)):
            _name_ends(axes, [(_curves(members, metric), NAMES[m], COLORS[m]) for m, members in rows.items()])
    return figure


def _gains_figure(pairs: Iterable[PairSummary]) -> Figure | None:
    panels = {}
    for pair in pairs:
        gains = [magnitudes for cell in pair.stepwise if (magnitudes := gain_magnitudes(cell.history)).size]
        if gains:
            panels[pair.pair.title] = np.array(gains)
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for axes, (title, gains_of_seeds) in zip(_row_of_axes(figure, len(panels)), panels.items(), strict=True):
        steps = np.arange(1, gains_of_seeds.shape[1] + 1)
        axes.bar(steps, gains_of_seeds.mean(axis=0), width=0.72, color=COLORS["stepwise"], alpha=0.85, linewidth=0)
        for seed_gains in gains_of_seeds:
            axes.plot(steps, seed_gains, "o", markersize=3, color=INK, alpha=0.55, markeredgewidth=0)
        axes.set_title(title)
        axes.set_xlabel("denoising step, from noise to image")
        axes.set_xticks(steps)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
    return figure


def _ablation_figure(one: AblationSummary) -> Figure | None:
    if not one.rows:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + max(2.6, 0.62 * len(one.rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    looks = list(_looks(row.cells[0].method for row in one.rows))
    for row, (color, marker) in zip(one.rows, looks, strict=True):
        _band(left, _curves(row.cells, one.metric), color, marker=marker, band=0.10)
    left.set_title(
        f"{reward_name(one.reward)} reward, {'training' if one.sampler == 'noisy' else 'noise-free'} sampler"
    )
    left.set_xlabel("updates")
    if one.rows[0].finals:
        reference = float(np.mean(list(one.rows[0].finals.values())))
        right.axvline(reference, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    for place, (row, (color, marker)) in enumerate(zip(one.rows, looks, strict=True)):
        _dots(right, -place, row.finals.values(), color, marker)
        right.annotate(
            row.label, (0.0, -place), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=color, weight="bold", va="bottom", bbox=PLAIN,
        )  # fmt: skip
    right.set_title("where it ends, seed by seed")
    right.set_ylim(0.35 - len(one.rows), 0.95)
    right.set_yticks([])
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.margins(x=0.12)
    right.spines["left"].set_visible(False)
    right.set_xlabel("final reward, mean and standard deviation")
    return figure


def _cost_figure(costs: Sequence[Cost]) -> Figure | None:
    costs = [cost for cost in costs if not math.isnan(cost.seconds)]
    if not costs:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(costs)), layout="constrained")
    axes = figure.subplots()
    places = -np.arange(len(costs), dtype=np.float64)
    lefts = np.zeros(len(costs))
    for phase in PHASES:
        widths = np.array([cost.phases[phase] for cost in costs])
        axes.barh(places, widths, left=lefts, height=0.62, color=PHASE_COLORS[phase], edgecolor="white", linewidth=0.8)
        lefts += widths
    for place, left, cost in zip(places, lefts, costs, strict=True):
        times = "" if math.isnan(cost.ratio) or cost.cells[0].method == "flow_grpo" else f"  {TIMES}{cost.ratio:.2f}"
        axes.annotate(f"{cost.seconds:.1f} s{times}", (left, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [cost.label for cost in costs])
    for tick, cost in zip(axes.get_yticklabels(), costs, strict=True):
        tick.set_color(COLORS[cost.cells[0].method])
        tick.set_fontweight("bold")
    axes.set_xlim(0, lefts.max() * 1.14)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds of an update, medians")
    handles = [Rectangle((0, 0), 1, 1, color=PHASE_COLORS[phase]) for phase in PHASES]
    axes.legend(
        handles, PHASES, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(PHASES), frameon=False,
        handlelength=0.9, handleheight=0.9, columnspacing=1.6, borderaxespad=0.2, labelcolor=INK,
    )  # fmt: skip
    return figure


def _samples_figure(pair: PairSummary, max_rows: int = 12, max_images: int = 4) -> Figure | None:
    drawn = {cell.seed: cell.samples for cell in pair.flow_grpo if cell.samples is not None}
    both = [(drawn[cell.seed], cell.samples) for cell in pair.stepwise if cell.samples and cell.seed in drawn]
    if not both:
        return None
    flow_grpo, stepwise = both[0]
    blocks = {
        "Base model": (FAINT, flow_grpo.before, flow_grpo.correct_before),
        NAMES["flow_grpo"]: (COLORS["flow_grpo"], flow_grpo.after, flow_grpo.correct_after),
        NAMES["stepwise"]: (COLORS["stepwise"], stepwise.after, stepwise.correct_after),
    }
    columns = min(max_images, flow_grpo.correct_before.shape[1])
    rows = min(max_rows, len(flow_grpo.texts))
    label, gap, space = 3.5, 0.35, 0.08
    across = label + 3 * columns + 2 * gap
    inch = WIDTH / across
    figure = Figure(figsize=(WIDTH, inch * (rows + 0.45)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, across), ylim=(rows, -0.45))
    axes.axis("off")
    for row, text in enumerate(flow_grpo.texts[:rows]):
        for number, line in enumerate(lines := _wrapped(text, 25)):
            axes.text(0.02, row + 0.5 + 0.27 * (number - (len(lines) - 1) / 2), line, va="center", fontsize=9.5)
    for block, (name, (color, images, correct)) in enumerate(blocks.items()):
        start = label + block * (columns + gap)
        axes.text(start + space / 2, -0.12, name, color=color, weight="bold", fontsize=11)
        frames = []
        for row in range(rows):
            for column in range(columns):
                x, y, side = start + column + space / 2, row + space / 2, 1.0 - space
                picture = _shrunk(images[row * correct.shape[1] + column])
                axes.imshow(picture, extent=(x, x + side, y + side, y), interpolation="none", aspect="auto")
                frames += [Rectangle((x, y), side, side)] * bool(correct[row, column])
        axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=FRAME, linewidth=1.6))
    axes.set(xlim=(0, across), ylim=(rows, -0.45))
    return figure


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


def _curves(cells: Iterable[Cell], metric: str) -> list[Curve]:
    return [curve for cell in cells if (curve := curve_of(cell, metric)) is not None]


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


def _running_reward(axes: Axes, cells: Sequence[Cell], factor: float) -> None:
    histories = [cell.history for cell in cells if all("reward/mean" in entry for entry in cell.history)]
    if not histories:
        return
    length = min(map(len, histories))
    rewards = [running_mean([entry["reward/mean"] for entry in history[:length]]) for history in histories]
    updates = np.array([entry["update"] for entry in histories[0][:length]], dtype=np.float64)
    points = np.column_stack([updates * factor, np.mean(rewards, axis=0)])
    axes.add_artist(Line2D(*points.T, color=COLORS[cells[0].method], linewidth=0.9, alpha=0.5))
    # The first means are over few updates; their jumps must not stretch the axis.
    axes.update_datalim(points[WINDOW - 1 :])


def _mark_crossing(axes: Axes, rows: Mapping[str, Sequence[Cell]], metric: str, factors: Mapping[str, float]) -> None:
    """Draws a line, at the reward where the mean curve of Flow-GRPO ends, between where both mean curves reach it.

    The curves are made rising, as for the ratios, so that a point may lie off a curve that falls.
    """
    curves = {method: _curves(cells, metric) for method, cells in rows.items()}
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
