"""Decides whether a candidate replaces the champion: better beyond chance on the same prompts and noise, and honestly.

The images of both models are judged prompt by prompt, and a paired bootstrap over prompts says how far the figures
would move with other prompts. Four gates look at its bounds:

- `overall`: GenEval's overall score is higher by more than `min_gain`, beyond its error.
- `tasks`: no task is lower beyond its error.
- `held_out`: a reward that training never saw is not lower beyond its error. A policy that has learnt to please its
  reward rather than to draw gains in the one and loses in the other.
- `diversity`: the images of a prompt differ from each other, beyond error, by more than `min_diversity_ratio` of what
  the opponent's do. A policy that draws one safe picture per prompt passes the other three.

The first and the last must be shown, the other two only must not be refuted, so few prompts never promote a candidate
but may hide a loss. Two things no gate can see: losses within the error add up over many promotions, so now and then
the opponent should be the base model; and a candidate that was picked for its figures on these very prompts and
noise looks better than it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.promotion.bootstrap import Floats, Interval, expanded, interval, resampled_means, task_means
from sfgrpo.types import TAGS, Prompt, Tag

Baseline = Literal["champion", "base model"]
Kind = Literal["difference", "ratio"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """What one model drew for the prompts of an evaluation, as the judges saw it."""

    prompts: Sequence[Prompt]
    noise_seed: int
    """Seed of the evaluation's noise: image g of prompt p starts from the same noise in both models."""
    correct_PG: NDArray[np.bool_]
    """GenEval's verdicts."""
    held_out_PG: Floats
    """A reward that training never saw."""
    training_PG: Floats
    """The reward that was trained on; reported beside the others, and no gate."""
    diversity_P: Floats
    """How far the images of a prompt lie apart, by `diversity` or any other measure that is 0 for copies."""

    def __post_init__(self) -> None:
        shape = self.correct_PG.shape
        if len(shape) != 2 or len(self.prompts) != shape[0] or self.correct_PG.size == 0:
            raise ValueError(
                f"verdicts have shape {list(shape)} for {len(self.prompts)} prompts; "
                "give a non-empty array [prompts, images per prompt]"
            )
        if self.correct_PG.dtype != np.bool_:
            raise ValueError(f"verdicts are of type {self.correct_PG.dtype}; give booleans, True for a correct image")
        for name, values, wanted in (
            ("held-out reward", self.held_out_PG, shape),
            ("training reward", self.training_PG, shape),
            ("diversity", self.diversity_P, shape[:1]),
        ):
            if values.shape != wanted:
                raise ValueError(f"{name} has shape {list(values.shape)}; the verdicts ask for {list(wanted)}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite in {int((~np.isfinite(values)).sum())} of {values.size} places")
        if (self.diversity_P < 0.0).any():
            raise ValueError(f"diversity is {self.diversity_P.min():g} at its least; a distance is never below 0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition of a promotion: what was observed, what is asked of it, and the verdict."""

    name: str
    kind: Kind
    rule: Literal["lower bound above", "upper bound at least"]
    threshold: float
    observed: Mapping[str, Interval]
    """Figures by their names in `Decision.to_dict`; each must meet the rule."""

    def holds(self, figure: str) -> bool:
        """Tells whether one of the observed figures meets the rule."""
        interval = self.observed[figure]
        if self.rule == "lower bound above":
            return interval.lower > self.threshold
        return interval.upper >= self.threshold

    @property
    def passed(self) -> bool:
        """Whether all observed figures meet the rule."""
        return all(map(self.holds, self.observed))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether the candidate replaces its opponent, and why."""

    opponent: Baseline
    """The champion; or the base model, where there is no champion yet."""
    gates: tuple[Gate, ...]
    candidate_score: float
    """GenEval's overall score."""
    opponent_score: float
    training: Interval
    """Difference of the training reward, for information."""
    num_prompts: int
    num_images: int
    """Of each model."""
    error_rate: float
    num_resamples: int
    seed: int

    @property
    def promoted(self) -> bool:
        """Whether every gate was passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the gates that were not passed."""
        return tuple(gate.name for gate in self.gates if not gate.passed)

    def to_dict(self) -> dict[str, float]:
        """Flattens to metrics "promotion/promoted", "promotion/overall", "promotion/overall_lower", ...

        Verdicts are 1 and 0 under "promotion/gate/". What is infinite is left out.
        """
        metrics = {
            "promotion/promoted": float(self.promoted),
            "promotion/candidate_score": self.candidate_score,
            "promotion/opponent_score": self.opponent_score,
            "promotion/num_prompts": float(self.num_prompts),
            "promotion/num_images": float(self.num_images),
        }
        intervals = {"training": self.training}
        for gate in self.gates:
            metrics[f"promotion/gate/{gate.name}"] = float(gate.passed)
            intervals |= gate.observed
        for name, bounds in intervals.items():
            metrics[f"promotion/{name}"] = bounds.estimate
            metrics[f"promotion/{name}_lower"] = bounds.lower
            metrics[f"promotion/{name}_upper"] = bounds.upper
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def markdown(self) -> str:
        """Lays the decision out as a sentence, a table and a note on how to read it."""
        lines = [["", "Candidate against " + self.opponent, "Bounds", "Needed", "Verdict"]]
        lines += [["---", "---:", "---:", "---", "---"]]
        for gate in self.gates:
            for figure, bounds in gate.observed.items():
                needed = f"{gate.rule} {gate.threshold:g}"
                cells = _cells(bounds, gate.kind)
                lines.append([LABELS[figure], *cells, needed, "passed" if gate.holds(figure) else "**failed**"])
        lines.append([LABELS["training"], *_cells(self.training, "difference"), "-", "-"])
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        return f"{self.sentence()}\n\n{table}\n{self._note()}\n"

    def sentence(self) -> str:
        """Says in Markdown whether the candidate is promoted, and why."""
        scores = f"GenEval {self.candidate_score:.3f} against {self.opponent_score:.3f} of the {self.opponent}"
        if self.promoted:
            first = " It is the first champion." if self.opponent == "base model" else ""
            return f"**Promoted.** {scores}, better beyond chance, and no other gate failed.{first}"
        return f"**Not promoted.** {scores}; {'; '.join(REFUSALS[name] for name in self.failed)}."

    def _note(self) -> str:
        return (
            f"{self.num_prompts} prompts, {self.num_images} images of each model from the same noise. Differences are "
            "means over tasks, and the ratio is one of such means. Each bound is one-sided and misses the true figure "
            f"in {self.error_rate:.0%} of comparisons; those of the tasks share these {self.error_rate:.0%}. They come "
            f"from a paired bootstrap over the prompts of every task, {self.num_resamples} resamples, seed {self.seed}."
        )


LABELS: dict[str, str] = {
    "overall": "Overall",
    **{str(tag): column for tag, column in COLUMNS.items()},
    "held_out": "Held-out reward",
    "diversity_ratio": "Diversity, as a ratio",
    "training": "Training reward",
}
"""How a figure is called in a report."""

REFUSALS = {
    "overall": "its overall score is not better beyond chance",
    "tasks": "a task is worse beyond its error",
    "held_out": "a reward that it was not trained on is lower beyond its error",
    "diversity": "the images of a prompt may have become too much alike",
}
"""What it means that a gate failed."""


def _cells(interval: Interval, kind: Kind) -> list[str]:
    sign = "+" if kind == "difference" else ""
    estimate, lower, upper = (
        f"{value:{sign}.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "?"
        for value in (interval.estimate, interval.lower, interval.upper)
    )
    return [estimate, f"{lower} to {upper}"]


def decide(
    candidate: ModelScores,
    opponent: ModelScores,
    *,
    against: Baseline = "champion",
    min_gain: float = 0.0,
    min_diversity_ratio: float = 0.8,
    error_rate: float = 0.05,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Decision:
    """Compares a candidate with the champion; or, before there is one, with the base model.

    Args:
        opponent: judged on the same prompts, in the same order, from the same noise.
        min_gain: what the overall score must gain, 0..1.
        min_diversity_ratio: what must be left of the opponent's diversity. An opponent without any has none to lose.
        error_rate: chance that a candidate no better than its opponent passes the first gate; and, of each of the
            two gates that only look for a loss, that it stops a candidate which has lost nothing.

    Raises:
        ValueError: the two were not judged alike, or there are too few resamples for a bound.
    """
    _check_alike(candidate, opponent)
    tags = [prompt.tag for prompt in candidate.prompts]
    _check_resampling(error_rate, num_resamples, num_tasks=len(set(tags)))
    figures = _figures(candidate, opponent, tags, error_rate, num_resamples, np.random.default_rng(seed))
    return Decision(
        opponent=against,
        gates=_gates(figures, min_gain, min_diversity_ratio),
        candidate_score=_score(candidate, tags),
        opponent_score=_score(opponent, tags),
        training=figures.training,
        num_prompts=len(tags),
        num_images=candidate.correct_PG.size,
        error_rate=error_rate,
        num_resamples=num_resamples,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What two models are compared by: differences, and the ratio of their diversities."""

    overall: Interval
    tasks: Mapping[str, Interval]
    held_out: Interval
    training: Interval
    diversity_ratio: Interval


def _figures(
    candidate: ModelScores,
    opponent: ModelScores,
    tags: Sequence[Tag],
    error_rate: float,
    num_resamples: int,
    generator: np.random.Generator,
) -> _Figures:
    """Estimates every figure and its bounds.

    A figure is the unweighted mean over tasks of the mean over their prompts, as GenEval's overall score is. Its
    error comes from `resampled_means`, and its bounds are percentiles of the resamples (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13). They are not corrected for bias and skewness, as BCa would be:
    a mean of differences has no bias, and between two models of the same quality, which is where the error rate must
    hold, either may be called the candidate, so that the differences have no skewness. What BCa estimates there is
    noise, and where a task is solved by both it cannot be estimated at all. Order statistics are taken as they are,
    with no interpolation between the few values that a difference of verdicts has.

    A task of few prompts has a standard error that is itself uncertain; `expanded` widens its bounds as Student's t
    would.

    The tasks share the error rate by Bonferroni's correction. Holm's would let through just the same candidates: one
    worse task fails the gate, and the first step of Holm is Bonferroni. Only Bonferroni also gives bounds to show.
    """
    values_PJ = _paired_values(candidate, opponent)
    observed_TJ = task_means(tags, values_PJ)
    resampled_RTJ = resampled_means(tags, values_PJ, num_resamples, generator)
    observed_J, resampled_RJ = observed_TJ.mean(axis=0), resampled_RTJ.mean(axis=1)
    tasks = [tag for tag in TAGS if tag in tags]
    wide = expanded(error_rate, len(tags) - len(tasks))
    tail = error_rate / len(tasks)
    overall, held_out, training = (interval(observed_J[j], resampled_RJ[:, j], wide) for j in range(3))
    return _Figures(
        overall=overall,
        tasks={
            str(tag): interval(observed_TJ[index, 0], resampled_RTJ[:, index, 0], expanded(tail, tags.count(tag) - 1))
            for index, tag in enumerate(tasks)
        },
        held_out=held_out,
        training=training,
        diversity_ratio=interval(
            _ratio(observed_J[3], observed_J[4]), _ratio(resampled_RJ[:, 3], resampled_RJ[:, 4]), wide
        ),
    )


def _paired_values(candidate: ModelScores, opponent: ModelScores) -> Floats:
    """Gives for every prompt, [P, 5]: differences of verdict, held-out and training reward; and both diversities."""
    return np.column_stack(
        [
            (candidate.correct_PG.sum(axis=1) - opponent.correct_PG.sum(axis=1)) / candidate.correct_PG.shape[1],
            (candidate.held_out_PG.astype(np.float64) - opponent.held_out_PG).mean(axis=1),
            (candidate.training_PG.astype(np.float64) - opponent.training_PG).mean(axis=1),
            candidate.diversity_P,
            opponent.diversity_P,
        ]
    )


def _gates(figures: _Figures, min_gain: float, min_diversity_ratio: float) -> tuple[Gate, ...]:
    return (
        _gate("overall", "lower bound above", min_gain, {"overall": figures.overall}),
        _gate("tasks", "upper bound at least", 0.0, figures.tasks),
        _gate("held_out", "upper bound at least", 0.0, {"held_out": figures.held_out}),
        _gate(
            "diversity",
            "lower bound above",
            min_diversity_ratio,
            {"diversity_ratio": figures.diversity_ratio},
            kind="ratio",
        ),
    )


def _gate(
    name: str,
    rule: Literal["lower bound above", "upper bound at least"],
    threshold: float,
    observed: Mapping[str, Interval],
    *,
    kind: Kind = "difference",
) -> Gate:
    return Gate(name=name, kind=kind, rule=rule, threshold=threshold, observed=observed)


def _score(evidence: ModelScores, tags: Sequence[Tag]) -> float:
    return float(task_means(tags, evidence.correct_PG.mean(axis=1, keepdims=True)).mean())


def _ratio(candidate: Any, opponent: Any) -> Any:
    """Divides; where both are 0 nothing was lost, which is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((candidate == 0.0) & (opponent == 0.0), 1.0, np.divide(candidate, opponent))


def _check_resampling(error_rate: float, num_resamples: int, num_tasks: int) -> None:
    if not 0.0 < error_rate < 0.5:
        raise ValueError(f"error_rate is {error_rate:g}; it must be above 0 and below 0.5")
    tail = error_rate / num_tasks
    if num_resamples * tail < 1.0:
        raise ValueError(
            f"num_resamples is {num_resamples}, and a bound is asked for that {tail:.2g} of them lie beyond; "
            f"give at least {math.ceil(1.0 / tail)}"
        )


def _check_alike(candidate: ModelScores, opponent: ModelScores) -> None:
    if candidate.correct_PG.shape != opponent.correct_PG.shape:
        raise ValueError(
            f"the candidate has {list(candidate.correct_PG.shape)} verdicts and its opponent "
            f"{list(opponent.correct_PG.shape)}; judge both on as many prompts and images"
        )
    for position, (one, other) in enumerate(zip(candidate.prompts, opponent.prompts, strict=True)):
        if one != other:
            raise ValueError(
                f"prompt {position} is {one.text!r} ({one.tag}) for the candidate and {other.text!r} ({other.tag}) "
                "for its opponent; judge both on the same prompts in the same order"
            )
    if candidate.noise_seed != opponent.noise_seed:
        raise ValueError(
            f"the candidate was drawn from noise seed {candidate.noise_seed} and its opponent from "
            f"{opponent.noise_seed}; draw both from the same noise"
        )
