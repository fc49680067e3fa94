"""Gates of a promotion: the candidate is better than its baseline beyond chance, and nothing was paid for it.

Both models draw the same prompts from the same noise. A paired bootstrap over prompts bounds how far each difference
would move with other prompts, where prompts that ask for the same count as one, and five gates look at the bounds:

- `overall`: GenEval's overall score rises by more than `min_gain`.
- `tasks`: no task is shown to be worse.
- `held_out`: a reward that training never saw is not shown to be lower. A policy that exploits its training reward
  gains there and loses here.
- `diversity`: the images of a prompt differ from each other by more than `min_diversity_ratio` of what the baseline's
  do. A policy that draws one safe picture per prompt passes the others.
- `agreement`: an independent counter confirms the images that are correct for a prompt which asks for a number. Their
  share is not shown to be below `min_agreement`, nor, where the baseline's is shown to be lower itself, below that. A
  policy that learned to draw one object too many, and that one so badly that the detector does not count it, passes the
  others. Where the detector has no such counter, there is no such gate, and the report says so.

The gain and the diversity must be shown, the other three only must not be refuted: few prompts never promote a
candidate, but they may hide a loss.

Why the agreement is tested in this way: few images of a baseline are correct for a prompt that asks for a number, so a
difference of two agreements is lost in the baseline's error, and the share of disputed images among all of them rises
with every honest gain, too. A bound on the candidate's own share needs neither, and the counter's own errors, a few in
a hundred images, are far from it. Its images are drawn for this gate alone, `agreement_images` of each prompt, since
those of the comparison are too few. The prompts are taken as they are, because a policy that hides objects from the
detector for some prompts does hide them: the bound is the binomial one.

Two things no gate can see. Losses within the standard error add up over many promotions, so compare with the base model
now and then. And a candidate that was selected by its scores on these very prompts and noise looks better than it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfgrpo.config.schema import PromotionConfig
from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.promotion.binomial import share_interval
from sfgrpo.promotion.bootstrap import (
    Floats,
    Interval,
    expanded,
    interval,
    num_independent,
    resampled_means,
    task_means,
)
from sfgrpo.types import TAGS, Prompt, Tag

Rule = Literal["lower bound above", "upper bound at least"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """Scores of the G images that one model drew for each of P prompts."""

    correct_PG: NDArray[np.bool_]
    """GenEval's verdicts."""
    held_out_PG: Floats
    """A reward that training never saw."""
    training_PG: Floats
    """The reward that was trained on; reported, but no gate."""
    diversity_P: Floats
    """How far the images of a prompt lie apart, by `diversity` or any other measure that is 0 for copies."""
    agreement: Agreement | None = None
    """With an independent counter, on images of their own; None where there is none."""

    def __post_init__(self) -> None:
        shape = self.correct_PG.shape
        if len(shape) != 2 or self.correct_PG.size == 0:
            raise ValueError(f"verdicts have shape {list(shape)}; give a non-empty array [prompts, images per prompt]")
        for name, values, expected in (
            ("held-out reward", self.held_out_PG, shape),
            ("training reward", self.training_PG, shape),
            ("diversity", self.diversity_P, shape[:1]),
        ):
            if values.shape != expected:
                raise ValueError(f"{name} has shape {list(values.shape)}; the verdicts need {list(expected)}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite in {int((~np.isfinite(values)).sum())} of {values.size} places")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition of a promotion, with the metrics that it looks at."""

    name: str
    rule: Rule
    threshold: float
    observed: Mapping[str, Interval]
    """Metrics by their names in `Comparison.to_dict`; each must meet the rule."""

    def holds(self, metric: str) -> bool:
        """Return whether one of the observed metrics meets the rule."""
        bounds = self.observed[metric]
        if self.rule == "lower bound above":
            return bounds.lower > self.threshold
        return bounds.upper >= self.threshold

    @property
    def passed(self) -> bool:
        """Whether all observed metrics meet the rule."""
        return all(map(self.holds, self.observed))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate beside its baseline: their scores and the gates."""

    gates: tuple[Gate, ...]
    candidate_score: float
    """GenEval's overall score."""
    baseline_score: float
    training: Interval
    """Difference of the training reward; reported, but no gate."""
    num_prompts: int
    num_images: int
    """Of each model."""
    baseline_agreement: float | None = None
    """Share of the baseline's counts that the independent counter confirms, where there are any."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the gates that were not passed."""
        return tuple(gate.name for gate in self.gates if not gate.passed)

    def to_dict(self) -> dict[str, float]:
        """Flatten to metrics "promotion/promoted", "promotion/overall", "promotion/overall_lower", ...

        Gates are 1 or 0 under "promotion/gate/". Infinite values are left out.
        """
        metrics = {
            "promotion/promoted": float(not self.failed),
            "promotion/candidate_score": self.candidate_score,
            "promotion/baseline_score": self.baseline_score,
            "promotion/num_prompts": float(self.num_prompts),
            "promotion/num_images": float(self.num_images),
        }
        if self.baseline_agreement is not None:
            metrics["promotion/baseline_agreement"] = self.baseline_agreement
        intervals = {"training": self.training}
        for gate in self.gates:
            metrics[f"promotion/gate/{gate.name}"] = float(gate.passed)
            intervals |= gate.observed
        for name, bounds in intervals.items():
            metrics[f"promotion/{name}"] = bounds.estimate
            metrics[f"promotion/{name}_lower"] = bounds.lower
            metrics[f"promotion/{name}_upper"] = bounds.upper
        return {key: value for key, value in metrics.items() if math.isfinite(value)}


def compare_scores(
    prompts: Sequence[Prompt], candidate: ModelScores, baseline: ModelScores, config: PromotionConfig
) -> Comparison:
    """Compare two models that drew the same prompts from the same noise.

    Args:
        prompts: Of both models, [P]; image g of prompt p started from the same noise in both.
        config: The thresholds, and the settings of the bootstrap. `error_rate` is the chance that a candidate no better
            than its baseline passes the first gate, and that each of the three gates that only look for a loss stops a
            candidate that lost nothing.

    Raises:
        ValueError: The numbers of prompts or images differ.
    """
    shapes = candidate.correct_PG.shape, baseline.correct_PG.shape
    if shapes[0] != shapes[1] or shapes[0][0] != len(prompts):
        raise ValueError(
            f"the candidate has {list(shapes[0])} verdicts and its baseline {list(shapes[1])} for {len(prompts)} "
            "prompts; score both on the same prompts with as many images"
        )
    tags = [prompt.tag for prompt in prompts]
    bounds = _intervals(tags, list(map(twin_key, prompts)), candidate, baseline, config)

    def gate(name: str, rule: Rule, threshold: float, *metrics: str) -> Gate:
        return Gate(name=name, rule=rule, threshold=threshold, observed={metric: bounds[metric] for metric in metrics})

    return Comparison(
        gates=(
            gate("overall", "lower bound above", config.min_gain, "overall"),
            gate("tasks", "upper bound at least", 0.0, *(tag for tag in TAGS if tag in tags)),
            gate("held_out", "upper bound at least", 0.0, "held_out"),
            gate("diversity", "lower bound above", config.min_diversity_ratio, "diversity_ratio"),
            *agreement_gate(candidate.agreement, baseline.agreement, config),
        ),
        candidate_score=_overall_score(candidate, tags),
        baseline_score=_overall_score(baseline, tags),
        training=bounds["training"],
        num_prompts=len(tags),
        num_images=candidate.correct_PG.size,
        baseline_agreement=None if baseline.agreement is None else baseline.agreement.share,
    )


def agreement_gate(
    candidate: Agreement | None, baseline: Agreement | None, config: PromotionConfig
) -> tuple[Gate, ...]:
    """Return the gate of the agreement, where both models have one."""
    if candidate is None or baseline is None:
        return ()
    ours, theirs = (
        share_interval(each.num_confirmed, each.num_correct, config.error_rate) for each in (candidate, baseline)
    )
    # The upper bound, since the few correct images of a weak baseline would excuse anything by their error.
    needed = min(config.min_agreement, theirs.upper)
    return (Gate(name="agreement", rule="upper bound at least", threshold=needed, observed={"agreement": ours}),)


def _intervals(
    tags: Sequence[Tag],
    requests: Sequence[Hashable],
    candidate: ModelScores,
    baseline: ModelScores,
    config: PromotionConfig,
) -> dict[str, Interval]:
    """Return every metric with its bounds.

    A metric is the unweighted mean over tasks of the mean over their prompts, as GenEval's overall score is. Its bounds
    are percentiles of the resamples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). They
    are not corrected for bias and skewness, as BCa would be: a mean of differences has no bias, and between two models
    of the same quality, where the error rate must hold, either may be called the candidate, so that the differences
    have no skewness. What BCa estimates there is noise, and where both models solve a task it is undefined.

    The tasks share the error rate by Bonferroni's correction. Holm's would let through the same candidates: one worse
    task fails the gate, and the first step of Holm is Bonferroni. Only Bonferroni also gives bounds to show.
    """
    independent = num_independent(tags, requests)
    values_PJ = _paired_values(candidate, baseline)
    observed_TJ = task_means(tags, values_PJ)
    generator = np.random.default_rng(config.seed)
    resampled_RTJ = resampled_means(tags, values_PJ, config.num_resamples, generator, requests)
    observed_J, resampled_RJ = observed_TJ.mean(axis=0), resampled_RTJ.mean(axis=1)
    tail = expanded(config.error_rate, sum(independent.values()) - len(independent))
    bounds = {
        name: interval(observed_J[column], resampled_RJ[:, column], tail)
        for column, name in enumerate(("overall", "held_out", "training"))
    }
    bounds["diversity_ratio"] = interval(
        _ratio(observed_J[3], observed_J[4]), _ratio(resampled_RJ[:, 3], resampled_RJ[:, 4]), tail
    )
    for row, (tag, number) in enumerate(independent.items()):
        task_tail = expanded(config.error_rate / len(independent), number - 1)
        bounds[tag] = interval(observed_TJ[row, 0], resampled_RTJ[:, row, 0], task_tail)
    return bounds


def _paired_values(candidate: ModelScores, baseline: ModelScores) -> Floats:
    """Return for every prompt, [P, 5]: differences of verdict, held-out and training reward, and both diversities."""
    return np.column_stack(
        [
            (candidate.correct_PG.sum(axis=1) - baseline.correct_PG.sum(axis=1)) / candidate.correct_PG.shape[1],
            (candidate.held_out_PG.astype(np.float64) - baseline.held_out_PG).mean(axis=1),
            (candidate.training_PG.astype(np.float64) - baseline.training_PG).mean(axis=1),
            candidate.diversity_P,
            baseline.diversity_P,
        ]
    )


def _overall_score(scores: ModelScores, tags: Sequence[Tag]) -> float:
    return float(task_means(tags, scores.correct_PG.mean(axis=1, keepdims=True)).mean())


def _ratio(candidate: Any, baseline: Any) -> Any:
    """Divide; where both are 0 nothing was lost, which is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((candidate == 0.0) & (baseline == 0.0), 1.0, np.divide(candidate, baseline))
