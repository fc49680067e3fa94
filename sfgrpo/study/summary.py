"""A plan with its results, measured: what the tables and figures of a report show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from sfgrpo.study.config import Ablation, Pair, Plan
from sfgrpo.study.metrics import PHASES, Difference, Reach, difference, median_ratio, reach
from sfgrpo.study.paper import Column
from sfgrpo.study.results import Key, Results, Run, final_values, mean_curve, runs_of_row, seconds_per_update
from sfgrpo.types import TAGS

Sampler = Literal["noisy", "noise-free"]
Unit = Literal["updates", "seconds"]

GENEVAL: tuple[Column, ...] = ("overall", *TAGS)
TARGETS: Mapping[Unit, float] = {"updates": 0.5, "seconds": 0.8}
"""Shares of Flow-GRPO's time within which Stepwise is meant to reach Flow-GRPO's final reward."""
COST_TARGETS: Mapping[int, float] = {5: 1.7}
"""Factors on the seconds of Flow-GRPO's update that are meant to suffice, by substeps of a clean estimate."""
CHEAPEST_COST_TARGET = 1.3
PREFIXES: Mapping[Sampler, str] = {"noisy": "evaluation_noisy", "noise-free": "evaluation"}
SAMPLING = ("num_steps", "noise_level", "guidance_scale")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Time that Stepwise needs to reach where Flow-GRPO ends, as a share of Flow-GRPO's own, over seeds."""

    sampler: Sampler
    unit: Unit
    reaches: Mapping[int, Reach]

    @property
    def median(self) -> float:
        """Median over seeds; infinite if most never arrive, NaN if Flow-GRPO gains nothing."""
        return median_ratio(reach.ratio for reach in self.reaches.values())

    @property
    def is_met(self) -> bool:
        """Whether the median is within the target."""
        return self.median <= TARGETS[self.unit]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairSummary:
    """Both methods on the same task."""

    pair: Pair
    flow_grpo: tuple[Run, ...]
    stepwise: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    """Empty as long as no seed has both methods."""
    cost: float
    """Median seconds of an update over those of Flow-GRPO."""
    geneval: Mapping[str, Difference]
    """Stepwise minus Flow-GRPO at the last evaluation: overall and every task."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of both methods."""
        return (*self.flow_grpo, *self.stepwise)

    @property
    def methods(self) -> dict[str, tuple[Run, ...]]:
        """The runs of each method that has any."""
        both = {"flow_grpo": self.flow_grpo, "stepwise": self.stepwise}
        return {method: runs for method, runs in both.items() if runs}

    def ratio(self, sampler: Sampler, unit: Unit) -> Ratio | None:
        """Return a ratio; None as long as no seed has both methods."""
        return next((ratio for ratio in self.ratios if (ratio.sampler, ratio.unit) == (sampler, unit)), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AblationRow:
    """One row of an ablation, against the first."""

    runs: tuple[Run, ...]
    finals: Mapping[int, float]
    """The ablation's metric at the last evaluation, by seed."""
    is_reference: bool
    """Whether this is the plan's first row, which the others are compared with."""
    difference: Difference | None
    """From the reference; None for itself, or if it has no runs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AblationSummary:
    """Rows that differ in one thing."""

    ablation: Ablation
    sampler: Sampler
    """The training sampler if all rows train with the same one, otherwise the noise-free one, which all share."""
    reward: str
    rows: tuple[AblationRow, ...]
    """Those with results, in the plan's order; nothing is compared if the first one of the plan is missing."""

    @property
    def metric(self) -> str:
        """Name of the metric that the rows are compared by."""
        return f"{PREFIXES[self.sampler]}/{self.reward}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Median seconds of an update of a row."""

    label: str
    runs: tuple[Run, ...]
    phases: Mapping[str, float]
    seconds: float
    """Median of the sum, which is not the sum of the medians."""
    ratio: float
    """Over the Flow-GRPO row that trains on the same task; NaN without one."""
    targets: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that a report shows."""

    plan: Plan
    runs: tuple[Run, ...]
    """The finished runs of the plan."""
    pairs: tuple[PairSummary, ...]
    ablations: tuple[AblationSummary, ...]
    costs: tuple[Cost, ...]
    missing: Mapping[Key, str]
    """Planned runs without usable results, and why."""


def rows_of(plan: Plan) -> list[str]:
    """Return every row of a plan once, pairs before ablations."""
    pairs = [row for pair in plan.pairs for row in (pair.flow_grpo, pair.stepwise)]
    return list(dict.fromkeys([*pairs, *(row for ablation in plan.ablations for row in ablation.rows)]))


def summarise(plan: Plan, results: Results) -> Summary:
    """Measure everything that a plan asks for and the results can answer."""
    planned = [(row, seed) for row in rows_of(plan) for seed in plan.seeds]
    return Summary(
        plan=plan,
        runs=tuple(results.runs[key] for key in planned if key in results.runs),
        pairs=tuple(_summarise_pair(plan, results, pair) for pair in plan.pairs),
        ablations=tuple(_summarise_ablation(plan, results, ablation) for ablation in plan.ablations),
        costs=_costs(plan, results),
        missing={key: results.unusable.get(key, "not there yet") for key in planned if key not in results.runs},
    )


def _summarise_pair(plan: Plan, results: Results, pair: Pair) -> PairSummary:
    flow_grpo = runs_of_row(results, pair.flow_grpo, plan.seeds)
    stepwise = runs_of_row(results, pair.stepwise, plan.seeds)
    seconds = seconds_per_update(stepwise), seconds_per_update(flow_grpo)
    ratios = []
    for sampler in PREFIXES:
        if reaches := _reaches(stepwise, flow_grpo, sampler):
            in_seconds = {seed: reach.scaled(*seconds) for seed, reach in reaches.items()}
            ratios.append(Ratio(sampler=sampler, unit="updates", reaches=reaches))
            ratios.append(Ratio(sampler=sampler, unit="seconds", reaches=in_seconds))
    compared = {
        name: difference(final_values(stepwise, f"geneval/{name}"), final_values(flow_grpo, f"geneval/{name}"))
        for name in GENEVAL
    }
    return PairSummary(
        pair=pair,
        flow_grpo=flow_grpo,
        stepwise=stepwise,
        ratios=tuple(ratios),
        cost=seconds[0] / seconds[1],
        geneval={name: gap for name, gap in compared.items() if gap is not None},
    )


def _reaches(stepwise: Iterable[Run], flow_grpo: Iterable[Run], sampler: Sampler) -> dict[int, Reach]:
    baselines = {run.seed: run for run in flow_grpo}
    reaches = {}
    for run in stepwise:
        if run.seed not in baselines:
            continue
        metric = f"{PREFIXES[sampler]}/{baselines[run.seed].reward}"
        curve, baseline = mean_curve([run], metric), mean_curve([baselines[run.seed]], metric)
        if curve is not None and baseline is not None:
            reaches[run.seed] = reach(curve.updates, curve.means, baseline.updates, baseline.means)
    return reaches


def _summarise_ablation(plan: Plan, results: Results, ablation: Ablation) -> AblationSummary:
    rows = [runs for row in ablation.rows if (runs := runs_of_row(results, row, plan.seeds))]
    samplers = {(runs[0].sampler, *(runs[0].params.get(f"sampling.{name}") for name in SAMPLING)) for runs in rows}
    sampler: Sampler = "noisy" if len(samplers) <= 1 else "noise-free"
    reward = rows[0][0].reward if rows else ""
    finals = [final_values(runs, f"{PREFIXES[sampler]}/{reward}") for runs in rows]
    is_first_there = bool(rows) and rows[0][0].row == ablation.rows[0]
    return AblationSummary(
        ablation=ablation,
        sampler=sampler,
        reward=reward,
        rows=tuple(
            AblationRow(
                runs=runs,
                finals=values,
                is_reference=runs[0].row == ablation.rows[0],
                difference=difference(values, finals[0]) if is_first_there and values is not finals[0] else None,
            )
            for runs, values in zip(rows, finals, strict=True)
        ),
    )


def _costs(plan: Plan, results: Results) -> tuple[Cost, ...]:
    rows = {row: runs for row in rows_of(plan) if (runs := runs_of_row(results, row, plan.seeds))}
    seconds = {row: seconds_per_update(runs) for row, runs in rows.items()}
    baselines = {row: _baseline(plan, rows, row) for row in rows}
    ratios = {row: seconds[row] / seconds[base] if base else math.nan for row, base in baselines.items()}
    compared = [row for row, runs in rows.items() if runs[0].method == "stepwise" and not math.isnan(ratios[row])]
    cheapest = min(compared, key=ratios.__getitem__, default=None)
    targets = {row: [CHEAPEST_COST_TARGET] * (row == cheapest) for row in rows}
    for row in compared:
        if (target := COST_TARGETS.get(rows[row][0].num_substeps)) is not None:
            targets[row].insert(0, target)
    return tuple(
        Cost(
            label=_unique_label(plan, rows, row),
            runs=runs,
            phases={phase: seconds_per_update(runs, [phase]) for phase in PHASES},
            seconds=seconds[row],
            ratio=ratios[row],
            targets=tuple(targets[row]),
        )
        for row, runs in rows.items()
    )


def _unique_label(plan: Plan, rows: Mapping[str, tuple[Run, ...]], row: str) -> str:
    """Return a row's label, with the title of its pair if another row has the same label."""
    label = rows[row][0].label
    titles = [pair.title for pair in plan.pairs if row in (pair.flow_grpo, pair.stepwise)]
    is_unique = sum(runs[0].label == label for runs in rows.values()) == 1
    return label if is_unique or not titles else f"{label} ({titles[0]})"


def _baseline(plan: Plan, rows: Mapping[str, tuple[Run, ...]], row: str) -> str | None:
    """Return the Flow-GRPO row to compare a row's cost with: its pair's, or the first one on the same task."""
    for pair in plan.pairs:
        if row in (pair.stepwise, pair.flow_grpo):
            return pair.flow_grpo if pair.flow_grpo in rows else None
    task = _task(rows[row][0])
    return next((name for name, runs in rows.items() if runs[0].method == "flow_grpo" and _task(runs[0]) == task), None)


def _task(run: Run) -> tuple[object, ...]:
    return run.reward, run.guidance_scale, run.sampler, run.num_steps, run.images_per_update
