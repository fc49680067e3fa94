"""GenEval's decision rules: against 2,000 golden verdicts, and by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.geneval.metadata import prompt_from_metadata
from sfgrpo.geneval.relations import relations_between
from sfgrpo.geneval.scorer import (
    filter_detections,
    is_correct,
)
from sfgrpo.types import Box, Detection, Prompt
from tests.support.reproductions import is_strict, partial_credit

GOLDEN = Path(__file__).parents[1] / "data" / "geneval_golden_vectors.jsonl.gz"


def seen(name: str, score: float = 1.0, box: Box = (0.0, 0.0, 10.0, 10.0), color: str | None = None) -> Detection:
    return Detection(class_name=name, box=box, score=score, color=color)


@pytest.fixture(scope="module")
def golden() -> list[tuple[dict[str, Any], Prompt, list[Detection]]]:
    vectors = [json.loads(line) for line in gzip.decompress(GOLDEN.read_bytes()).splitlines()]
    return [
        (
            vector,
            prompt_from_metadata(vector["meta"] | {"prompt": "golden"}),
            [
                seen(name, score, tuple(box), vector["colors"].get(",".join(map(str, box))))
                for name, found in vector["dets"].items()
                for *box, score in found
            ],
        )
        for vector in vectors
    ]


def test_there_are_as_many_golden_vectors_as_expected(golden):
    assert len(golden) == 2000


def test_official_verdict_agrees_with_every_golden_vector(golden):
    assert [vector["meta"] for vector, *case in golden if is_correct(*case) != vector["correct"]] == []


def test_strict_verdict_agrees_with_every_golden_vector(golden):
    assert [vector["meta"] for vector, *case in golden if is_strict(*case) != vector["strict"]] == []


def test_partial_credit_agrees_with_every_golden_vector(golden):
    credits = [partial_credit(*case) for _, *case in golden]
    np.testing.assert_allclose(credits, [vector["score"] for vector, *_ in golden], atol=1e-9)


@pytest.mark.parametrize(("score", "kept"), [(0.3, 0), (np.float32(0.3), 0), (0.3001, 1)])
def test_score_must_exceed_the_threshold_in_float32(score, kept):
    assert len(filter_detections([seen("dog", float(score))], "colors").get("dog", [])) == kept


def test_counting_prompts_hold_every_class_to_the_higher_threshold():
    detections = [seen("dog", 0.89), seen("cat", 0.91)]
    assert list(filter_detections(detections, "counting")) == ["cat"]
    assert list(filter_detections(detections, "position")) == ["dog", "cat"]


def test_best_sixteen_of_a_class_are_kept_in_order_of_score():
    scores = [score / 100 for score in range(50, 90)]
    kept = filter_detections([seen("dog", score) for score in scores], "colors")["dog"]
    assert [detection.score for detection in kept] == scores[: -16 - 1 : -1]


def test_of_equal_scores_the_later_detection_leads():
    detections = [seen("dog", 0.9, color="red"), seen("dog", 0.9, color="blue")]
    assert [detection.color for detection in filter_detections(detections, "colors")["dog"]] == ["blue", "red"]


def test_extra_instances_pass_the_official_verdict_but_not_the_strict_one():
    prompt, detections = single_object("dog"), [seen("dog"), seen("dog"), seen("cat")]
    assert is_correct(prompt, detections)
    assert not is_strict(prompt, detections)


def test_counting_wants_exactly_the_count():
    prompt = counting("dog", 3)
    assert [is_correct(prompt, [seen("dog")] * number) for number in (2, 3, 4)] == [False, True, False]


def test_color_is_judged_on_the_most_confident_instance():
    detections = [seen("dog", 0.8, color="red"), seen("dog", 0.9, color="blue")]
    assert is_correct(colors("dog", "blue"), detections)
    assert not is_correct(colors("dog", "red"), detections)


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((0, 40, 10, 50), {"left of"}),
        ((90, 40, 100, 50), {"right of"}),
        ((40, 0, 50, 10), {"above"}),
        ((40, 90, 50, 100), {"below"}),
        ((90, 90, 100, 100), {"right of", "below"}),
        ((41, 40, 51, 50), set()),
        ((40, 40, 50, 50), set()),
    ],
)
def test_relations_follow_the_offset_of_the_centres(box, relations):
    assert relations_between(box, (40, 40, 50, 50)) == relations


LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


@pytest.mark.parametrize(
    ("prompt", "detections", "credit"),
    [
        (single_object("dog"), [seen("dog")] * 16, -14.0),
        (two_object("dog", "cat"), [seen("dog")], 0.5),
        (counting("dog", 4), [seen("dog")] * 3, 0.75),
        (colors("dog", "red"), [seen("dog", color="blue")], 0.5),
        (colors("dog", "red"), [seen("dog", color="red")] * 2, 0.0),
        (color_attr("dog", "cat", "red", "blue"), [seen("dog", color="red"), seen("cat", color="red")], 0.75),
        (position("dog", "cat", "left of"), [seen("dog", box=LEFT), seen("cat", box=RIGHT)], 1.0),
        (position("dog", "cat", "left of"), [seen("dog", box=RIGHT), seen("cat", box=LEFT)], 0.75),
        (position("dog", "cat", "left of"), [seen("dog")], 1 / 3),
    ],
)
def test_partial_credit_is_flow_grpos(prompt, detections, credit):
    assert partial_credit(prompt, detections) == pytest.approx(credit)


def test_position_without_a_target_fails_all_verdicts():
    prompt = position("dog", "cat", "left of")
    assert not is_correct(prompt, [seen("dog")])
    assert not is_strict(prompt, [seen("dog")])
