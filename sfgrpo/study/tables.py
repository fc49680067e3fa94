"""The tables of a study, ready to be laid out as HTML or as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.study.metrics import PHASES, Difference, Reach, spread
from sfgrpo.study.paper import paper_base, paper_row
from sfgrpo.study.results import Run
from sfgrpo.study.summary import (
    GENEVAL,
    PREFIXES,
    TARGETS,
    AblationSummary,
    PairSummary,
    Ratio,
    Sampler,
    Summary,
    final_values,
    seconds_per_update,
)
from sfgrpo.study.text import (
    DASH,
    PLUS_MINUS,
    TIMES,
    ablation_digits,
    difference_of,
    judged,
    mark,
    number,
    ratio,
    signed,
    spread_of,
)

SAMPLERS: Mapping[Sampler, str] = {"noisy": "training sampler", "noise-free": "noise-free sampler"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell of a table."""

    text: str
    note: str = ""
    """Small print beside it."""
    look: str = ""
    """Class of its style: base, flow_grpo, stepwise, paper, strong, met or missed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a header; the first column is words, the others are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]

    def markdown(self) -> str:
        """Lays the table out as Markdown."""
        lines = [list(self.header), ["---"] + ["---:"] * (len(self.header) - 1)]
        lines += [[f"{one.text} ({one.note})" if one.note else one.text for one in row] for row in self.rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def ratio_table(pair: PairSummary, seeds: Sequence[int]) -> Table:
    """Lays out how much of Flow-GRPO's time Stepwise needs, for every seed."""
    header = ("Stepwise / Flow-GRPO", *(f"Seed {seed}" for seed in seeds), "Median", "Target", "")
    return Table(header=header, rows=tuple(_ratio_row(one, seeds) for one in pair.ratios))


def geneval_table(pair: PairSummary) -> Table:
    """Lays out GenEval over seeds above the paper's own rows."""
    rows = [
        _geneval_row(name, runs, look, place)
        for name, runs, look, place in (
            ("Base model", pair.flow_grpo or pair.stepwise, "base", 0),
            ("Flow-GRPO", pair.flow_grpo, "flow_grpo", -1),
            ("Stepwise", pair.stepwise, "stepwise", -1),
        )
        if runs
    ]
    if pair.geneval:
        rows.append(_difference_row(pair))
    for name in _paper_names(pair):
        printed = paper_row(name)
        rows.append(_row(f"Paper: {name}", (number(printed.get(column)) for column in GENEVAL), "paper"))
    return Table(header=("GenEval", "Overall", *COLUMNS.values()), rows=tuple(rows))


def ablation_table(one: AblationSummary) -> Table:
    """Lays out where the rows of an ablation end."""
    header = (
        "Row",
        f"Reward, {SAMPLERS[one.sampler]}",
        "Difference",
        *(("Reward, noise-free",) if one.sampler == "noisy" else ()),
        "GenEval",
        "s / update",
    )
    rows, digits = [], ablation_digits(one)
    for row in one.rows:
        against = Entry(text="reference")
        if row.difference is not None:
            against = Entry(text=difference_of(row.difference, digits), note=judged(row.difference))
        noise_free = spread(final_values(row.runs, f"{PREFIXES['noise-free']}/{one.reward}").values())
        entries = [
            Entry(text=row.label),
            Entry(text=spread_of(spread(row.finals.values()), digits)),
            against,
            *([Entry(text=spread_of(noise_free, digits))] if one.sampler == "noisy" else []),
            Entry(text=spread_of(spread(final_values(row.runs, "geneval/overall").values()), 3)),
            Entry(text=number(seconds_per_update(row.runs))),
        ]
        rows.append(tuple(entries))
    return Table(header=header, rows=tuple(rows))


def cost_table(summary: Summary) -> Table:
    """Lays out what an update costs, by phase."""
    header = ("Median seconds of an update", *(phase.capitalize() for phase in PHASES), "All", "Ratio", "Target", "")
    rows = []
    for cost in summary.costs:
        met = [cost.ratio <= target for target in cost.targets]
        rows.append(
            (
                Entry(text=cost.label, look=cost.runs[0].method),
                *(Entry(text=number(cost.phases[phase])) for phase in PHASES),
                Entry(text=number(cost.seconds), look="strong"),
                Entry(text=DASH if math.isnan(cost.ratio) else f"{TIMES}{cost.ratio:.2f}"),
                Entry(text=", ".join(f"{target:.1f}" for target in cost.targets)),
                Entry(text=", ".join(map(mark, met)), look=_look(all(met)) if met else ""),
            )
        )
    return Table(header=header, rows=tuple(rows))


def _look(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _row(name: str, texts: Iterable[str], look: str) -> tuple[Entry, ...]:
    return Entry(text=name, look=look), *(Entry(text=text) for text in texts)


def _ratio_row(one: Ratio, seeds: Sequence[int]) -> tuple[Entry, ...]:
    what = "Updates" if one.unit == "updates" else "Compute seconds"
    return (
        Entry(text=f"{what}, {SAMPLERS[one.sampler]}", look="strong" if one.sampler == "noisy" else ""),
        *(_reach_entry(one.reaches.get(seed)) for seed in seeds),
        Entry(text=ratio(one.median), look="strong"),
        Entry(text=f"{TARGETS[one.unit]:.2f}"),
        Entry(text=mark(one.is_met), look=_look(one.is_met)),
    )


def _reach_entry(one: Reach | None) -> Entry:
    if one is None:
        return Entry(text=DASH)
    reached = DASH if one.candidate is None else f"{one.candidate:.0f}"
    return Entry(text=ratio(one.ratio), note=f"{reached} / {one.baseline:.0f}")


def _geneval_row(name: str, runs: Sequence[Run], look: str, place: int) -> tuple[Entry, ...]:
    entries = [run.evaluations[place] for run in runs]
    metrics = [f"geneval/{column}" for column in GENEVAL]
    values = ([entry[metric] for entry in entries if metric in entry] for metric in metrics)
    return _row(name, (spread_of(spread(of_column)) for of_column in values), look)


def _difference_row(pair: PairSummary) -> tuple[Entry, ...]:
    return Entry(text=f"Difference, {PLUS_MINUS} paired and pooled standard error", look="strong"), *(
        _difference_entry(pair.geneval.get(name)) for name in GENEVAL
    )


def _difference_entry(one: Difference | None) -> Entry:
    if one is None:
        return Entry(text=DASH)
    errors = (
        "" if math.isnan(one.std) else f"{PLUS_MINUS} {number(one.paired_stderr, 3)}, {number(one.pooled_stderr, 3)}"
    )
    return Entry(text=signed(one.mean), note=errors)


def _paper_names(pair: PairSummary) -> list[str]:
    names = list(pair.pair.paper or ())
    bases = [base for name in names[:1] if (base := paper_base(name)) is not None]
    return [*bases, *names]
