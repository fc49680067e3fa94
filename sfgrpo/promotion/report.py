"""The report of a promotion, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sfgrpo.config.schema import PromotionConfig
from sfgrpo.config.stages import PromoteStage
from sfgrpo.evaluation.identity import EvaluationIdentity
from sfgrpo.geneval.table import COLUMNS, GenEvalTable, markdown_table
from sfgrpo.promotion.bootstrap import Interval
from sfgrpo.promotion.decision import Baseline, PromotionDecision
from sfgrpo.promotion.gates import Comparison

SAMPLES = "samples.png"

LABELS: dict[str, str] = {
    "overall": "Overall",
    **{str(tag): column for tag, column in COLUMNS.items()},
    "held_out": "Held-out reward",
    "diversity_ratio": "Diversity (ratio)",
    "agreement": "Agreement (share)",
    "training": "Training reward",
}
"""Labels of the metrics."""

REFUSALS = {
    "overall": "its overall score is not better beyond chance",
    "tasks": "it is worse in a task, beyond chance",
    "held_out": "a reward that it was not trained on is lower, beyond chance",
    "diversity": "the images of a prompt may have become too similar",
    "agreement": "an independent counter disputes too many of its correct counts, beyond chance",
}
"""What a failed gate means."""


def decision_sentence(comparison: Comparison, baseline: Baseline) -> str:
    """Return in one Markdown sentence whether the candidate is promoted, and why."""
    scores = (
        f"On GenEval the candidate scores {comparison.candidate_score:.3f} and the {baseline} "
        f"{comparison.baseline_score:.3f}"
    )
    if comparison.failed:
        return f"**Not promoted.** {scores}, but {', and '.join(REFUSALS[gate] for gate in comparison.failed)}."
    first = " It is the first champion." if baseline == "base model" else ""
    return f"**Promoted.** {scores}. The gain is beyond chance, and every other gate passed.{first}"


def promotion_report(
    config: PromoteStage, decision: PromotionDecision, comparison: Comparison, tables: Mapping[str, GenEvalTable]
) -> str:
    """Return the whole report: the decision, the gates, how to read them, and the scores of both models."""
    baseline = "its base model" if decision.baseline_version is None else f"version {decision.baseline_version}"
    return (
        f"# {decision.model}: version {decision.version} against {baseline}\n\n"
        f"{decision.sentence}\n\n"
        f"{gates_table(comparison, decision.baseline)}\n"
        f"{_note(comparison, config.promotion)}\n\n"
        f"{markdown_table(tables)}\n"
        f"The candidate was selected on the same prompts with other noise (seed {config.evaluation.seed}; here it is "
        f"{config.promotion.seed}), so the choice of prompts may favour it.\n\n"
        f"{_subjects(decision)}"
        f"Samples of both models are in {SAMPLES}. MLflow run: {decision.run_id}. Decided at {decision.decided_at}.\n"
    )


def _subjects(decision: PromotionDecision) -> str:
    """Return a paragraph with the digests of what was evaluated."""
    named = (f"{name}: {EvaluationIdentity.from_dict(each).sentence()}" for name, each in decision.evaluated.items())
    return f"Evaluated: {' '.join(named)}\n\n"


def gates_table(comparison: Comparison, baseline: Baseline) -> str:
    """Return a Markdown table with one row for each metric: the difference, its bounds, and whether it passes."""
    lines = [["", f"Candidate against {baseline}", "Bounds", "Needed", "Gate"], ["---", "---:", "---:", "---", "---"]]
    for gate in comparison.gates:
        for metric, bounds in gate.observed.items():
            outcome = "passed" if gate.holds(metric) else "**failed**"
            lines.append([LABELS[metric], *_cells(metric, bounds), f"{gate.rule} {gate.threshold:g}", outcome])
    lines.append([LABELS["training"], *_cells("training", comparison.training), "-", "-"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(metric: str, bounds: Interval) -> tuple[str, str]:
    sign = "" if metric in ("diversity_ratio", "agreement") else "+"
    estimate, lower, upper = (
        f"{value:{sign}.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "?"
        for value in (bounds.estimate, bounds.lower, bounds.upper)
    )
    return estimate, f"{lower} to {upper}"


def _note(comparison: Comparison, config: PromotionConfig) -> str:
    return (
        f"Each model drew {comparison.num_images} images of {comparison.num_prompts} prompts, from the same noise. "
        "Differences are means over tasks, and the diversity is the ratio of two such means. The bounds come from a "
        f"paired bootstrap over the prompts of every task ({config.num_resamples:,} resamples, seed {config.seed}). "
        f"Each bound is one-sided with an error rate of {config.error_rate:.0%}, which the tasks share. The training "
        "reward is shown for information and is no gate. "
        f"{agreement_note(comparison, config)}"
    )


def agreement_note(comparison: Comparison, config: PromotionConfig) -> str:
    """Return in a sentence how the agreement was measured, or why it was not."""
    gate = next((gate for gate in comparison.gates if gate.name == "agreement"), None)
    if gate is None:
        return "Agreement was not tested: this detector has no independent counter, or no prompt asks for a number."
    theirs = comparison.baseline_agreement
    return (
        f"The agreement is the candidate's share of correct counts that an independent counter confirms, on "
        f"{config.agreement_images} images of each prompt that asks for a number; of the baseline's it confirms "
        f"{'none, since none is correct' if theirs is None else f'{theirs:.3f}'}."
    )
