"""Figures: which there are, what their lines hold, and files that are the same on every machine."""

from __future__ import annotations

import re

import matplotlib
import numpy as np
import pytest

from sfgrpo.study.figures import draw_figures, slug, svg_of
from sfgrpo.study.plotting import COLORS
from sfgrpo.study.results import load_results, seconds_per_update
from sfgrpo.study.summary import summarise
from tests.support.synthetic_study import EVERY, SEEDS, STEPS, UPDATES, make_plan, write_study

NAMES = {
    "reward_clip_reward_guidance_1",
    "quality_clip_reward_guidance_1",
    "samples_clip_reward_guidance_1",
    "reward_geneval_reward_guidance_4_5",
    "quality_geneval_reward_guidance_4_5",
    "samples_geneval_reward_guidance_4_5",
    "gains",
    "ablation_what_normalises_the_gains",
    "ablation_substeps_of_a_clean_estimate",
    "ablation_sampler",
    "cost",
}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return summarise(make_plan(), load_results(write_study(tmp_path_factory.mktemp("study"))))


@pytest.fixture(scope="module")
def figures(summary):
    return draw_figures(summary)


def thick_line(axes, color):
    return next(line for line in axes.lines if line.get_color() == color and line.get_linewidth() > 2)


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_pair_and_ablation_has_its_figures(figures):
    assert set(figures) == NAMES


def test_names_are_fit_for_files():
    assert slug("CLIP reward, guidance 4.5!") == "clip_reward_guidance_4_5"


def test_reward_curves_are_means_over_seeds_in_updates_and_in_time(figures, summary):
    pair = summary.pairs[0]
    values = [[entry["evaluation_noisy/clip"] for entry in run.evaluations] for run in pair.stepwise]
    left, right = figures["reward_clip_reward_guidance_1"].axes
    for axes, pace in ((left, 1.0), (right, seconds_per_update(pair.stepwise) / 60.0)):
        line = thick_line(axes, COLORS["stepwise"])
        np.testing.assert_allclose(line.get_ydata(), np.mean(values, axis=0))
        np.testing.assert_allclose(line.get_xdata(), pace * np.arange(0, UPDATES + 1, EVERY))


def test_reward_figure_says_the_measured_ratios(figures, summary):
    pair = summary.pairs[0]
    said = words(figures["reward_clip_reward_guidance_1"])
    assert f"{pair.ratio('noisy', 'updates').median:.2f} of the updates" in said
    assert f"{pair.ratio('noisy', 'seconds').median:.2f} of the compute time" in said
    assert {"Stepwise", "Flow-GRPO"} <= set(said)


def test_crossing_lies_on_both_mean_curves(figures):
    left, _ = figures["reward_clip_reward_guidance_1"].axes
    rings = {line.get_markeredgecolor(): line for line in left.lines if line.get_markerfacecolor() == "white"}
    for color in COLORS.values():
        line, ring = thick_line(left, color), rings[color]
        assert ring.get_ydata()[0] == pytest.approx(np.interp(ring.get_xdata()[0], line.get_xdata(), line.get_ydata()))
    assert rings[COLORS["stepwise"]].get_ydata()[0] == rings[COLORS["flow_grpo"]].get_ydata()[0]


def test_gain_bars_are_the_mean_gains_of_the_steps(figures, summary):
    axes = figures["gains"].axes[0]
    names = [f"gain/step_{step:02d}/abs_mean" for step in range(STEPS)]
    expected = [np.mean([entry[name] for run in summary.pairs[0].stepwise for entry in run.history]) for name in names]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], expected)


def test_ablation_shows_every_seed_and_names_every_row(figures, summary):
    one = summary.ablations[0]
    right = figures["ablation_what_normalises_the_gains"].axes[1]
    assert words(figures["ablation_what_normalises_the_gains"]) == [row.runs[0].label for row in one.rows]
    dots = [
        line.get_xdata() for line in right.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata()) == 3
    ]
    np.testing.assert_allclose(dots, [[row.finals[seed] for seed in SEEDS] for row in one.rows])


def test_cost_bars_add_up_to_the_phases(figures, summary):
    axes = figures["cost"].axes[0]
    ends = [max(bar.get_x() + bar.get_width() for bar in group) for group in zip(*axes.containers, strict=True)]
    np.testing.assert_allclose(ends, [sum(cost.phases.values()) for cost in summary.costs])
    assert [label.get_text() for label in axes.get_yticklabels()] == [cost.label for cost in summary.costs]


def test_sample_frames_are_as_many_as_correct_images(figures, summary):
    pair = summary.pairs[0]
    axes = figures["samples_clip_reward_guidance_1"].axes[0]
    flow_grpo, stepwise = pair.flow_grpo[0].samples, pair.stepwise[0].samples
    correct = (flow_grpo.correct_before, flow_grpo.correct_after, stepwise.correct_after)
    assert [len(frames.get_paths()) for frames in axes.collections] == [verdicts.sum() for verdicts in correct]
    np.testing.assert_array_equal(axes.images[0].get_array(), flow_grpo.before[0])
    np.testing.assert_array_equal(axes.images[-1].get_array(), stepwise.after[-1])


def test_the_same_figure_is_the_same_file_with_its_text_as_text_and_leaves_the_style_of_others_alone(figures, summary):
    before = dict(matplotlib.rcParams)
    svg = svg_of(figures["cost"])
    assert svg == svg_of(draw_figures(summary)["cost"])
    assert ">Stepwise, 5 substeps<" in svg
    assert "DejaVu" not in svg
    assert not re.search(r'(href|src)="http', svg)
    assert dict(matplotlib.rcParams) == before


def test_a_study_without_runs_has_no_figures(tmp_path):
    assert draw_figures(summarise(make_plan(), load_results(tmp_path))) == {}


@pytest.mark.parametrize("rows", [("flow_grpo_cfg1",), ("stepwise_cfg1",), ("stepwise_per_step",)])
def test_half_a_study_is_drawn_as_far_as_it_goes(tmp_path, rows):
    results = load_results(write_study(tmp_path, rows=rows, seeds=(1,)))
    figures = draw_figures(summarise(make_plan(), results))
    assert "cost" in figures
    assert all(svg_of(figure) for figure in figures.values())
