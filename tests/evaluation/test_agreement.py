"""Agreement of GenEval's verdicts with an independent counter, and what is reported of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.geneval.grammar import counting, single_object
from sfgrpo.types import Prompt

PROMPTS = [counting("ring", 2), counting("heart", 3), single_object("ring")]


def agreement(correct: list[list[int]], confirmed: list[list[int]], prompts: list[Prompt] = PROMPTS) -> Agreement:
    return Agreement.of(prompts, np.array(correct, dtype=bool), np.array(confirmed, dtype=bool))


def test_share_is_that_of_the_correct_images_of_prompts_that_ask_for_a_number():
    found = agreement([[1, 1], [1, 0], [1, 1]], [[1, 0], [1, 0], [1, 1]])
    assert (found.num_correct, found.num_confirmed, found.share) == (3, 2, pytest.approx(2 / 3))
    metrics = found.to_dict()
    assert metrics["geneval/confirmed_counting"] == pytest.approx(2 / 4)
    assert metrics["geneval/confirmed"] == pytest.approx((2 / 4 + 1) / 2)
    assert (metrics["agreement/share"], metrics["agreement/num_images"]) == (found.share, 3.0)


def test_share_of_no_images_is_left_out_and_every_metric_is_finite():
    found = agreement([[0, 0], [0, 0], [1, 1]], [[0, 0], [0, 0], [1, 1]])
    assert found.share is None and found.warning is None
    metrics = found.to_dict()
    assert "agreement/share" not in metrics and metrics["agreement/num_images"] == 0.0
    assert all(map(math.isfinite, metrics.values()))


def test_prompts_without_a_number_have_no_share():
    found = agreement([[1, 1]], [[1, 1]], [single_object("ring")])
    assert found.share is None
    assert found.to_dict().keys() == {"geneval/confirmed", "geneval/confirmed_stderr", "agreement/num_images"}


def test_low_agreement_is_worth_a_warning():
    low = agreement([[1, 1], [1, 1], [1, 1]], [[1, 1], [1, 0], [1, 1]])
    assert low.warning is not None and "confirms only 3 of the 4 images" in low.warning
    assert agreement([[1, 1], [1, 1], [1, 1]], [[1, 1], [1, 1], [0, 0]]).warning is None
