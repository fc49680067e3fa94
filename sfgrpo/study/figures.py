"""The figures of a study: one colour for each method, bands over seeds, names at the lines instead of legends."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sfgrpo.study import plotting
from sfgrpo.study.metrics import PHASES, gain_magnitudes
from sfgrpo.study.plotting import COLORS, FAINT, INK, NAMES, PHASE_COLORS, STYLE, WIDTH
from sfgrpo.study.results import mean_curve, mean_curves, seconds_per_update
from sfgrpo.study.summary import PREFIXES, AblationSummary, Cost, PairSummary, Summary, Unit
from sfgrpo.study.text import factor, reward_name

SAMPLE_ROWS, SAMPLE_COLUMNS = 12, 4
"""Prompts, and images of each by every model, in the figure of samples."""


def draw_figures(summary: Summary) -> dict[str, Figure]:
    """Draw every figure that a study has results for, by name."""
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):
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
    """Return a figure as SVG, byte for byte reproducible, whose text stays text in fonts that are everywhere."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return re.sub(r"'DejaVu Sans'(, [^;\"]*)?(?=[;\"])", plotting.FONTS, file.getvalue())


def slug(title: str) -> str:
    """Turn a title into a file name."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def _reward_figure(pair: PairSummary) -> Figure | None:
    if not pair.methods:
        return None
    reward = pair.runs[0].reward
    metric = f"{PREFIXES['noisy']}/{reward}"
    curves = mean_curves(pair.methods, metric)
    paces = {method: seconds_per_update(runs) for method, runs in pair.methods.items()}
    longest_s = max(pace * pair.methods[method][0].num_updates for method, pace in paces.items())
    time, seconds = (
        ("seconds", 1.0) if longest_s < 180 else ("minutes", 60.0) if longest_s < 10_800 else ("hours", 3600.0)
    )
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels: list[tuple[Axes, Unit, dict[str, float]]] = [
        (left, "updates", dict.fromkeys(paces, 1.0)),
        (right, "seconds", {method: pace / seconds for method, pace in paces.items()}),
    ]
    for axes, unit, factors in panels:
        for method, runs in pair.methods.items():
            plotting.draw_running_reward(axes, runs, factors[method])
            if method in curves:
                plotting.draw_band(axes, curves[method], COLORS[method], factor=factors[method])
        plotting.mark_crossing(axes, curves, factors)
        plotting.write_ratio(axes, pair.ratio("noisy", unit))
    left.set_title(f"{reward_name(reward)} reward, training sampler")
    left.set_xlabel("updates")
    right.set_xlabel(f"{time} of compute")
    plotting.name_ends(left, curves)
    return figure


def _quality_figure(pair: PairSummary) -> Figure | None:
    if not pair.methods:
        return None
    reward = pair.runs[0].reward
    titles = {f"evaluation/{reward}": f"{reward_name(reward)} reward, noise-free", "geneval/overall": "GenEval overall"}
    titles.setdefault("evaluation/likeness", "Likeness, never trained on")
    panels = {metric: curves for metric in titles if (curves := mean_curves(pair.methods, metric))}
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (metric, curves) in zip(row, panels.items(), strict=True):
        for method, curve in curves.items():
            plotting.draw_band(axes, curve, COLORS[method])
        axes.set_title(titles[metric])
        axes.set_xlabel("updates")
        if metric == next(iter(panels)):
            plotting.name_ends(axes, curves)
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
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, gains_of_seeds) in zip(row, panels.items(), strict=True):
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


def _ablation_figure(summary: AblationSummary) -> Figure | None:
    if not summary.rows:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + max(2.6, 0.62 * len(summary.rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    looks = plotting.looks_of(row.runs[0].method for row in summary.rows)
    for place, (row, (color, marker)) in enumerate(zip(summary.rows, looks, strict=True)):
        if curve := mean_curve(row.runs, summary.metric):
            plotting.draw_band(left, curve, color, marker=marker, alpha=0.10)
        plotting.draw_seeds(right, -place, list(row.finals.values()), color, marker)
        right.annotate(
            row.runs[0].label, (0.0, -place), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=color, weight="bold", va="bottom", bbox=plotting.BACKED,
        )  # fmt: skip
    if summary.rows[0].finals:
        reference = float(np.mean(list(summary.rows[0].finals.values())))
        right.axvline(reference, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    sampler = "training" if summary.sampler == "noisy" else "noise-free"
    left.set_title(f"{reward_name(summary.reward)} reward, {sampler} sampler")
    left.set_xlabel("updates")
    right.set_title("where it ends, seed by seed")
    right.set_xlabel("final reward, mean and standard deviation")
    right.set_ylim(0.35 - len(summary.rows), 0.95)
    right.set_yticks([])
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.margins(x=0.12)
    right.spines["left"].set_visible(False)
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
        is_baseline = math.isnan(cost.ratio) or cost.runs[0].method == "flow_grpo"
        text = f"{cost.seconds:.1f} s" if is_baseline else f"{cost.seconds:.1f} s  {factor(cost.ratio)}"
        axes.annotate(text, (left, place), (6, 0), textcoords="offset points", va="center")
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


def _samples_figure(pair: PairSummary) -> Figure | None:
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
    columns = min(SAMPLE_COLUMNS, flow_grpo.correct_before.shape[1])
    rows = min(SAMPLE_ROWS, len(flow_grpo.texts))
    # All lengths are in sides of an image with the space around it.
    label, gap, space = 3.5, 0.35, 0.08
    across = label + 3 * columns + 2 * gap
    figure = Figure(figsize=(WIDTH, WIDTH / across * (rows + 0.45)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    for row, text in enumerate(flow_grpo.texts[:rows]):
        for number, line in enumerate(lines := textwrap.wrap(text, 25)):
            axes.text(0.02, row + 0.5 + 0.27 * (number - (len(lines) - 1) / 2), line, va="center", fontsize=9.5)
    for block, (name, (color, images, correct)) in enumerate(blocks.items()):
        start = label + block * (columns + gap)
        axes.text(start + space / 2, -0.12, name, color=color, weight="bold", fontsize=11)
        frames = []
        for row, column in np.ndindex(rows, columns):
            x, y, side = start + column + space / 2, row + space / 2, 1.0 - space
            picture = plotting.shrunk(images[row * correct.shape[1] + column])
            axes.imshow(picture, extent=(x, x + side, y + side, y), interpolation="none", aspect="auto")
            frames += [Rectangle((x, y), side, side)] * bool(correct[row, column])
        axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=plotting.FRAME, linewidth=1.6))
    # Every image sets the limits to its own.
    axes.set(xlim=(0, across), ylim=(rows, -0.45))
    return figure
