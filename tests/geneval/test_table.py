"""The summary table: means by hand, standard errors against simulation, layout against the paper's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sfgrpo.geneval.table import markdown_table, summarise

TWO_TASKS = ["single_object", "counting", "counting", "counting"]
VERDICTS = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=bool)


def test_overall_weighs_tasks_not_images():
    table = summarise(TWO_TASKS, VERDICTS)
    assert table.tasks["counting"].mean == pytest.approx(0.5)
    assert table.overall.mean == pytest.approx((1.0 + 0.5) / 2)
    assert table.correct_images == pytest.approx(5 / 8)
    assert table.correct_prompts == pytest.approx(3 / 4)


def test_clustered_error_is_that_of_the_prompt_means():
    share = summarise(TWO_TASKS, VERDICTS).tasks["counting"]
    assert share.stderr == pytest.approx(np.std([0.5, 0.0, 1.0], ddof=1) / math.sqrt(3))
    assert share.stderr_binomial == pytest.approx(math.sqrt(0.25 / 6))


def test_fully_correlated_images_double_the_binomial_error():
    generator = np.random.default_rng(0)
    copies = np.repeat(generator.random((400, 1)) < 0.6, 4, axis=1)
    share = summarise(["colors"] * 400, copies).overall
    assert share.stderr / share.stderr_binomial == pytest.approx(2.0, rel=0.01)


def test_clustered_error_matches_the_spread_of_repeated_evaluations():
    generator = np.random.default_rng(1)
    shares = []
    for _ in range(400):
        ability = generator.beta(0.6, 0.4, size=(100, 1))
        shares.append(summarise(["colors"] * 100, generator.random((100, 4)) < ability).overall)
    spread = np.std([share.mean for share in shares])
    assert np.mean([share.stderr for share in shares]) == pytest.approx(spread, rel=0.1)
    assert np.mean([share.stderr_binomial for share in shares]) < 0.75 * spread


def test_overall_error_combines_independent_tasks():
    table = summarise(["colors", "colors", "position", "position"], VERDICTS)
    assert table.overall.stderr == pytest.approx(
        math.hypot(table.tasks["colors"].stderr, table.tasks["position"].stderr) / 2
    )


def test_single_prompt_counts_as_a_single_image():
    assert summarise(["colors"], np.array([[True, False]])).overall.stderr == pytest.approx(0.5)


def test_metrics_are_flat_and_named():
    metrics = summarise(TWO_TASKS, VERDICTS).to_dict()
    assert {"geneval/overall", "geneval/overall_stderr", "geneval/counting", "geneval/counting_stderr"} <= set(metrics)
    assert "geneval/position" not in metrics
    assert metrics["geneval/num_images"] == 8
    assert all(isinstance(value, float) for value in metrics.values())


def test_markdown_has_the_papers_columns():
    table = markdown_table({"base": summarise(TWO_TASKS, VERDICTS), "tuned": summarise(TWO_TASKS, ~VERDICTS)})
    header, rule, base, _ = table.splitlines()
    assert header == "| Model | Overall | Single | Two | Counting | Colors | Position | Attr |"
    assert rule.count("---") == 8
    assert base == "| base | 0.75 ± 0.14 | 1.00 ± 0.00 | - | 0.50 ± 0.29 | - | - | - |"


@pytest.mark.parametrize("verdicts", [VERDICTS[:3], VERDICTS[0], np.zeros((4, 0), dtype=bool)])
def test_verdicts_of_the_wrong_shape_are_refused(verdicts):
    with pytest.raises(ValueError, match="give a non-empty array"):
        summarise(TWO_TASKS, verdicts)
