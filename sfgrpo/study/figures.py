"""The figures of a study: one colour for each method, bands over seeds, names at the lines instead of legends."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sfgrpo.study.metrics import PHASES, gain_magnitudes
from sfgrpo.study.plotting import (
    COLORS,
    FAINT,
    FONTS,
    FRAME,
    INK,
    NAMES,
    PHASE_COLORS,
    PLAIN,
    STYLE,
    WIDTH,
    _band,
    _curves,
    _dots,
    _looks,
    _mark_crossing,
    _name_ends,
    _row_of_axes,
    _running_reward,
    _shrunk,
    _wrapped,
    _write_ratio,
)
from sfgrpo.study.results import Results
from sfgrpo.study.summary import (
    PREFIXES,
    AblationSummary,
    Cost,
    PairSummary,
    Summary,
    seconds_per_update,
    summarise,
)
from sfgrpo.study.text import TIMES, reward_name

if TYPE_CHECKING:
    from sfgrpo.study.config import Plan


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
    paces = {method: seconds_per_update(runs) for method, runs in rows.items() if runs}
    longest = max(pace * rows[method][0].num_updates for method, pace in paces.items())
    scale, unit_name = (
        (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 10_800 else (3600.0, "hours")
    )
    for axes, unit in ((left, "updates"), (right, "seconds")):
        for method, runs in rows.items():
            if runs:
                factor = 1.0 if unit == "updates" else paces[method] / scale
                _running_reward(axes, runs, factor)
                _band(axes, _curves(runs, metric), COLORS[method], factor=factor)
        _mark_crossing(axes, rows, metric, {m: 1.0 if unit == "updates" else pace / scale for m, pace in paces.items()})
        _write_ratio(axes, pair.ratio("noisy", "updates" if unit == "updates" else "seconds"))
    left.set_title(f"{reward_name(metric.split('/')[1])} reward, training sampler")
    left.set_xlabel("updates")
    right.set_xlabel(f"{unit_name} of compute")
    _name_ends(left, [(_curves(runs, metric), NAMES[method], COLORS[method]) for method, runs in rows.items()])
    return figure


def _quality_figure(pair: PairSummary) -> Figure | None:
    runs = (*pair.flow_grpo, *pair.stepwise)
    if not runs:
        return None
    reward = runs[0].reward
    panels = {f"evaluation/{reward}": f"{reward_name(reward)} reward, noise-free", "geneval/overall": "GenEval overall"}
    if reward != "likeness":
        panels["evaluation/likeness"] = "Likeness, never trained on"
    panels = {metric: title for metric, title in panels.items() if _curves(runs, metric)}
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
        gains = [magnitudes for run in pair.stepwise if (magnitudes := gain_magnitudes(run.history)).size]
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
    looks = list(_looks(row.runs[0].method for row in one.rows))
    for row, (color, marker) in zip(one.rows, looks, strict=True):
        _band(left, _curves(row.runs, one.metric), color, marker=marker, band=0.10)
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
        times = "" if math.isnan(cost.ratio) or cost.runs[0].method == "flow_grpo" else f"  {TIMES}{cost.ratio:.2f}"
        axes.annotate(f"{cost.seconds:.1f} s{times}", (left, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [cost.label for cost in costs])
    for tick, cost in zip(axes.get_yticklabels(), costs, strict=True):
        tick.set_color(COLORS[cost.runs[0].method])
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
    drawn = {run.seed: run.samples for run in pair.flow_grpo if run.samples is not None}
    both = [(drawn[run.seed], run.samples) for run in pair.stepwise if run.samples and run.seed in drawn]
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
