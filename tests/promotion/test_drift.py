"""Drift: metrics that changed by more than rounding changes them, and no others."""

from __future__ import annotations

import pytest

from sfgrpo.promotion.drift import TOLERANCE, drift, tolerance

IMAGES = {"single_object": 24, "colors": 640}
RECORDED = {
    "geneval/overall": 0.5,
    "geneval/overall_stderr": 0.03,
    "geneval/single_object": 0.75,
    "geneval/single_object_stderr": 0.1,
    "geneval/colors": 0.25,
    "geneval/colors_stderr": 0.02,
    "geneval/correct_images": 0.4,
    "evaluation/likeness": 0.5,
    "evaluation/clip": 30.0,
}


def test_same_metrics_are_no_drift():
    reasons, table = drift(RECORDED, RECORDED, IMAGES)
    assert reasons == []
    assert "| Overall | 0.500 \N{PLUS-MINUS SIGN} 0.030 | 0.500 | +0.000 | 0.020 |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("key", "change", "label"),
    [
        ("geneval/overall", 0.021, "Overall"),
        ("geneval/single_object", -0.09, "Single"),
        ("geneval/colors", 0.021, "Colors"),
        ("evaluation/likeness", -0.021, "Reward likeness"),
        ("evaluation/clip", 0.7, "Reward clip"),
    ],
)
def test_metric_that_changed_too_much_is_reported(key, change, label):
    reasons, _ = drift(RECORDED, {**RECORDED, key: RECORDED[key] + change}, IMAGES)
    assert [reason.split(" was ")[0] for reason in reasons] == [label]


@pytest.mark.parametrize(
    ("key", "change"), [("geneval/overall", 0.019), ("geneval/single_object", 2 / 24 - 1e-9), ("evaluation/clip", 0.5)]
)
def test_metric_that_changed_as_by_rounding_is_no_drift(key, change):
    assert drift(RECORDED, {**RECORDED, key: RECORDED[key] + change}, IMAGES)[0] == []


def test_few_images_may_flip_in_a_small_task():
    assert tolerance("geneval/single_object", 0.5, IMAGES) == pytest.approx(2 / 24)
    assert tolerance("geneval/colors", 0.5, IMAGES) == TOLERANCE
