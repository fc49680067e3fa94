"""The fit of the detector: what the labels say of a region, and the coefficients of the repository."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import fit_detector
from benchmarks.fit_detector import Examples, examples_of, fit, joined, rendered_examples
from benchmarks.labels import LabelledObject, load_labels
from sfgrpo.shapes.detector import COEFFICIENTS
from sfgrpo.shapes.world import CLASSES, Shape, render


def label(classes: list[str], sure: bool, x: float = 16.0) -> LabelledObject:
    return LabelledObject(x=x, y=16.0, colors=["red"], classes=classes, sure=sure)


@pytest.mark.parametrize(
    ("found", "accepted", "kind"),
    [
        (label(["circle"], True), {"circle": 1.0}, "circle"),
        (label(["circle", "heart"], False), {"circle": 1.0, "heart": 1.0}, "doubtful"),
        (label(["circle"], False), {"circle": 0.5}, "doubtful"),
        (label([], True), {}, "smear"),
        (label(["circle"], True, x=24.0), {}, "smear"),
    ],
)
def test_people_accept_a_region_as_what_its_label_says(found, accepted, kind):
    shape = Shape(class_name="circle", color="red", center=(16.0, 16.0), radius=8.0)
    examples = examples_of(render((shape,), np.random.default_rng(0))[None], [[found]], 1.0)
    assert {name: share for name, share in zip(CLASSES, examples.accepted[0], strict=True) if share} == accepted
    assert list(examples.kinds) == [kind]


def test_fit_recovers_the_log_odds_of_its_examples(monkeypatch):
    """A regression without penalty on one feature of two values gives the log-odds of both groups."""
    monkeypatch.setattr(fit_detector, "RIDGE", 1e-9)
    values = np.repeat([[0.0], [1.0]], 100, axis=0)
    accepted = np.zeros((200, len(CLASSES)))
    accepted[:20], accepted[100:170] = 1.0, 1.0
    weights, bias = fit(
        Examples(
            features=values,
            accepted=accepted,
            kinds=np.full(200, "circle"),
            images=np.arange(200),
            weights=np.ones(200),
        )
    )
    assert bias == pytest.approx(np.log(0.2 / 0.8), abs=1e-3)
    assert weights[0] + bias == pytest.approx(np.log(0.7 / 0.3), abs=1e-3)


def test_coefficients_of_the_repository_are_those_of_its_labels():
    images = load_labels()
    labelled = examples_of(np.stack([each.image for each in images]), [each.objects for each in images], 1.0)
    weights, bias = fit(joined(labelled, rendered_examples()))
    stored = json.loads(COEFFICIENTS.read_text())
    ours, theirs = (
        1.0 / (1.0 + np.exp(-(labelled.features @ np.array(each["weights"]) + np.array(each["bias"]))))
        for each in ({"weights": weights, "bias": bias}, stored)
    )
    assert np.abs(ours - theirs).max() < 0.02
