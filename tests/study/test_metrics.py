"""The numbers of a study, each against a second way to get it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sfgrpo.study.metrics import (
    difference,
    first_reached,
    gain_magnitudes,
    median_ratio,
    reach,
    running_mean,
    spread,
)


def test_running_mean_is_the_mean_of_the_last_values_there_are():
    values = np.random.default_rng(0).random(25)
    expected = [values[max(0, i - 9) : i + 1].mean() for i in range(25)]
    np.testing.assert_allclose(running_mean(values), expected)
    np.testing.assert_allclose(running_mean([3.0, 5.0], window=10), [3.0, 4.0])
    assert running_mean([]).size == 0


def test_spread_divides_by_one_less_than_the_count():
    one = spread([1.0, 2.0, 6.0])
    assert (one.mean, one.std) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))


def test_one_seed_has_a_mean_and_no_deviation():
    assert spread([2.0]).mean == 2.0
    assert math.isnan(spread([2.0]).std)
    assert math.isnan(spread([]).mean)


def test_differences_are_of_the_seeds_that_both_rows_have():
    gap = difference({0: 1.0, 1: 5.0, 7: 9.0}, {1: 2.0, 7: 3.0, 8: 1.0})
    assert gap is not None
    assert gap.per_seed == {1: 3.0, 7: 6.0}
    assert gap.mean == 4.5
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_standard_errors_are_those_of_repeated_studies():
    generator = np.random.default_rng(1)
    shared, own = generator.normal(size=(4000, 3)), 0.5 * generator.normal(size=(2, 4000, 3))
    rows, others = own + shared
    gaps = [difference(dict(enumerate(a)), dict(enumerate(b))) for a, b in zip(rows, others, strict=True)]
    seen = np.std([gap.mean for gap in gaps])
    paired = math.sqrt(np.mean([gap.paired_stderr**2 for gap in gaps]))
    pooled = math.sqrt(np.mean([gap.pooled_stderr**2 for gap in gaps]))
    assert paired == pytest.approx(seen, rel=0.05)
    assert pooled == pytest.approx(math.sqrt(2 * (1 + 0.25) / 3), rel=0.05)


def test_interval_holds_the_truth_in_95_of_100_studies():
    samples = np.random.default_rng(2).normal(size=(8000, 3))
    gaps = [difference(dict(enumerate(sample)), dict.fromkeys(range(3), 0.0)) for sample in samples]
    assert np.mean([gap.is_beyond_spread for gap in gaps]) == pytest.approx(0.05, abs=0.01)


def test_one_seed_is_never_beyond_the_spread():
    gap = difference({0: 5.0}, {0: 1.0})
    assert gap is not None
    assert not gap.is_beyond_spread
    assert gap.is_same_sign


def test_seeds_of_both_signs_do_not_agree():
    assert not difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0}).is_same_sign
    assert not difference({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}).is_same_sign


def test_first_reached_is_where_a_dense_curve_crosses():
    updates, values = np.array([0.0, 10.0, 20.0, 40.0]), np.array([1.0, 3.0, 2.0, 7.0])
    dense = np.linspace(0.0, 40.0, 400_001)
    curve = np.interp(dense, updates, values)
    for target in (1.5, 3.0, 3.1, 6.9, 7.0):
        assert first_reached(updates, values, target) == pytest.approx(dense[curve >= target - 1e-12][0], abs=1e-3)


def test_first_reached_is_the_start_for_a_curve_that_begins_there_and_none_for_one_that_never_arrives():
    assert first_reached([0, 10], [2.0, 3.0], 2.0) == 0.0
    assert first_reached([0, 10], [2.0, 3.0], 3.5) is None


def test_ratio_compares_when_both_reach_where_the_baseline_ends():
    one = reach([0, 10, 20], [0.0, 2.0, 3.0], [0, 20, 40], [0.0, 0.5, 1.0])
    assert (one.target, one.candidate, one.baseline) == (1.0, 5.0, 40.0)
    assert one.ratio == 0.125


def test_baseline_counts_from_when_it_first_is_as_good_as_at_its_end():
    one = reach([0, 10], [0.0, 3.0], [0, 10, 20, 30], [0.0, 2.0, 1.5, 1.0])
    assert (one.target, one.candidate, one.baseline) == (1.5, 5.0, 10.0)


def test_peak_that_is_not_held_reaches_nothing():
    held = reach([0, 10, 20, 30], [0.0, 1.0, 1.0, 1.0], [0, 30], [0.0, 1.0])
    peak = reach([0, 10, 20, 30], [0.0, 1.0, 0.2, 0.6], [0, 30], [0.0, 1.0])
    assert held.candidate == 10.0
    assert peak.candidate is None


def test_falling_curve_is_its_mean_from_the_start():
    assert reach([0, 10], [0.9, 0.7], [0, 10], [0.0, 0.75]).candidate == 0.0


def test_ratio_is_infinite_for_who_never_arrives_and_nothing_where_the_baseline_gains_nothing():
    assert reach([0, 10], [0.0, 0.5], [0, 10], [0.0, 1.0]).ratio == math.inf
    assert math.isnan(reach([0, 10], [0.0, 0.5], [0, 10], [0.0, 0.0]).ratio)


def test_ratio_in_seconds_is_that_in_updates_times_the_cost():
    one = reach([0, 10], [0.0, 2.0], [0, 10], [0.0, 1.0])
    seconds = one.scaled(6.0, 4.0)
    assert (seconds.candidate, seconds.baseline) == (30.0, 40.0)
    assert seconds.ratio == pytest.approx(one.ratio * 6.0 / 4.0)
    assert reach([0, 10], [0.0, 0.5], [0, 10], [0.0, 1.0]).scaled(6.0, 4.0).ratio == math.inf


def test_median_counts_seeds_that_never_arrive_and_leaves_out_those_without_a_ratio():
    assert median_ratio([0.4, math.inf, 0.6]) == 0.6
    assert median_ratio([0.4, math.inf]) == math.inf
    assert median_ratio([0.4, math.nan, 0.6]) == 0.5
    assert math.isnan(median_ratio([math.nan]))


def test_gains_are_averaged_for_every_step_in_its_order():
    history = [{"gain/mean": 9.0, "gain/step_01/abs_mean": 2.0 * i, "gain/step_00/abs_mean": 1.0 * i} for i in (1, 3)]
    np.testing.assert_allclose(gain_magnitudes(history), [2.0, 4.0])
    assert gain_magnitudes([{"reward/mean": 1.0}]).size == 0
