"""Decisions as they are stored."""

from __future__ import annotations

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
