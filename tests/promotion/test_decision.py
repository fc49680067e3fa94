"""Decisions as they are stored."""

from __future__ import annotations

import json

from sfgrpo.promotion.decision import PromotionDecision

DECISION = PromotionDecision(
    model="shapes",
    version=2,
    promoted=False,
    sentence="**Not promoted.**",
    failed=("overall", "tasks"),
    baseline="champion",
    baseline_version=1,
    num_entries=1,
    run_id="r",
    metrics={"promotion/promoted": 0.0},
)


def test_decision_is_read_as_it_was_written():
    assert PromotionDecision.from_json(DECISION.to_json()) == DECISION


def test_decision_that_calls_its_baseline_the_opponent_is_read():
    older = {key.replace("baseline", "opponent"): value for key, value in json.loads(DECISION.to_json()).items()}
    assert "opponent_version" in older
    assert PromotionDecision.from_json(json.dumps(older)) == DECISION
