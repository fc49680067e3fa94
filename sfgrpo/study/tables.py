"""The tables of a study, ready to be laid out as HTML or as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.study import text
from sfgrpo.study.metrics import PHASES, Difference, Reach, spread
from sfgrpo.study.paper import paper_base, paper_row
from sfgrpo.study.results import Run, final_values, seconds_per_update
from sfgrpo.study.summary import GENEVAL, PREFIXES, TARGETS, AblationSummary, PairSummary, Ratio, Sampler, Summary, Unit

SAMPLERS: Mapping[Sampler, str] = {"noisy": "training sampler", "noise-free": "noise-free sampler"}
OVERVIEW: Mapping[tuple[Sampler, Unit], str] = {
    ("noisy", "updates"): "of Flow-GRPO's updates to its final reward",
    ("noisy", "seconds"): "of its compute time",
    ("noise-free", "updates"): "of its updates, noise-free sampler",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table."""

    text: str
    note: str = ""
    """Small print beside it."""
    look: str = ""
    """Class of its style: base, flow_grpo, stepwise, paper, strong, met or missed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a header; the first column holds names, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]

    def markdown(self) -> str:
        """Lay the table out as Markdown."""
        lines = [list(self.header), ["---"] + ["---:"] * (len(self.header) - 1)]
        lines += [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row] for row in self.rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def overview_table(summary: Summary) -> Table:
    """Lay out what every pair comes to: the medians of its ratios, final GenEval, and cost."""
    header = ("Stepwise against Flow-GRPO", *OVERVIEW.values(), "final GenEval", "seconds of an update")
    return Table(header=header, rows=tuple(_overview_row(pair) for pair in summary.pairs if pair.ratios))


def missing_table(summary: Summary) -> Table:
    """Lay out which runs are missing, and why."""
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (row, seed), reason in summary.missing.items():
        seeds[row, reason].append(seed)
    rows = [(row, ", ".join(map(str, of_row)), reason) for (row, reason), of_row in seeds.items()]
    return Table(header=("Missing", "Seeds", "Why"), rows=tuple(tuple(map(Entry, row)) for row in rows))


def ratio_table(pair: PairSummary, seeds: Sequence[int]) -> Table:
    """Lay out how much of Flow-GRPO's time Stepwise needs, for every seed."""
    header = ("Stepwise / Flow-GRPO", *(f"Seed {seed}" for seed in seeds), "Median", "Target", "")
    return Table(header=header, rows=tuple(_ratio_row(of_sampler, seeds) for of_sampler in pair.ratios))


def geneval_table(pair: PairSummary) -> Table:
    """Lay out GenEval over seeds above the paper's own rows."""
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
        name = Entry(f"Difference, {text.PLUS_MINUS} paired and pooled standard error", look="strong")
        rows.append((name, *(_difference_entry(pair.geneval.get(column)) for column in GENEVAL)))
    for paper in _paper_names(pair):
        printed = paper_row(paper)
        rows.append(_row(f"Paper: {paper}", (text.number(printed.get(column)) for column in GENEVAL), "paper"))
    return Table(header=("GenEval", "Overall", *COLUMNS.values()), rows=tuple(rows))


def ablation_table(summary: AblationSummary) -> Table:
    """Lay out where the rows of an ablation end."""
    others = {"Reward, noise-free": f"{PREFIXES['noise-free']}/{summary.reward}", "GenEval": "geneval/overall"}
    if summary.sampler == "noise-free":
        del others["Reward, noise-free"]
    digits = text.digits_for(spread(row.finals.values()).std for row in summary.rows)
    rows = []
    for row in summary.rows:
        compared = Entry("reference" if row.is_reference else text.DASH)
        if row.difference is not None:
            compared = Entry(text.difference_of(row.difference, digits), note=text.significance(row.difference))
        finals = [spread(final_values(row.runs, metric).values()) for metric in others.values()]
        rows.append(
            (
                Entry(row.runs[0].label),
                Entry(text.spread_of(spread(row.finals.values()), digits)),
                compared,
                *(Entry(text.spread_of(final, 3)) for final in finals),
                Entry(text.number(seconds_per_update(row.runs))),
            )
        )
    header = ("Row", f"Reward, {SAMPLERS[summary.sampler]}", "Difference", *others, "s / update")
    return Table(header=header, rows=tuple(rows))


def cost_table(summary: Summary) -> Table:
    """Lay out what an update costs, by phase."""
    header = ("Median seconds of an update", *(phase.capitalize() for phase in PHASES), "All", "Ratio", "Target", "")
    rows = []
    for cost in summary.costs:
        marks = [text.mark(cost.ratio <= target) for target in cost.targets]
        rows.append(
            (
                Entry(cost.label, look=cost.runs[0].method),
                *(Entry(text.number(cost.phases[phase])) for phase in PHASES),
                Entry(text.number(cost.seconds), look="strong"),
                Entry(text.factor(cost.ratio)),
                Entry(", ".join(f"{target:.1f}" for target in cost.targets)),
                Entry(", ".join(marks), look=next((word for word in ("missed", "met") if word in marks), "")),
            )
        )
    return Table(header=header, rows=tuple(rows))


def _row(name: str, texts: Iterable[str], look: str) -> tuple[Entry, ...]:
    return Entry(name, look=look), *map(Entry, texts)


def _overview_row(pair: PairSummary) -> tuple[Entry, ...]:
    entries = []
    for (sampler, unit), _ in OVERVIEW.items():
        measured = pair.ratio(sampler, unit)
        if measured is None:
            entries.append(Entry(text.DASH))
        else:
            word = text.mark(measured.is_met)
            entries.append(Entry(text.ratio(measured.median), note=f"{word}, target {TARGETS[unit]:.2f}", look=word))
    overall = pair.geneval.get("overall")
    gap = Entry(text.DASH) if overall is None else Entry(text.difference_of(overall), note=text.significance(overall))
    return Entry(pair.pair.title), *entries, gap, Entry(text.factor(pair.cost))


def _ratio_row(measured: Ratio, seeds: Sequence[int]) -> tuple[Entry, ...]:
    what = "Updates" if measured.unit == "updates" else "Compute seconds"
    word = text.mark(measured.is_met)
    return (
        Entry(f"{what}, {SAMPLERS[measured.sampler]}", look="strong" if measured.sampler == "noisy" else ""),
        *(_reach_entry(measured.reaches.get(seed)) for seed in seeds),
        Entry(text.ratio(measured.median), look="strong"),
        Entry(f"{TARGETS[measured.unit]:.2f}"),
        Entry(word, look=word),
    )


def _reach_entry(reach: Reach | None) -> Entry:
    if reach is None:
        return Entry(text.DASH)
    reached = text.DASH if reach.candidate is None else f"{reach.candidate:.0f}"
    return Entry(text.ratio(reach.ratio), note=f"{reached} / {reach.baseline:.0f}")


def _geneval_row(name: str, runs: Sequence[Run], look: str, place: int) -> tuple[Entry, ...]:
    entries = [run.evaluations[place] for run in runs]
    metrics = [f"geneval/{column}" for column in GENEVAL]
    values = ([entry[metric] for entry in entries if metric in entry] for metric in metrics)
    return _row(name, (text.spread_of(spread(of_column)) for of_column in values), look)


def _difference_entry(difference: Difference | None) -> Entry:
    if difference is None:
        return Entry(text.DASH)
    errors = [text.number(error, 3) for error in (difference.paired_stderr, difference.pooled_stderr)]
    note = "" if math.isnan(difference.std) else f"{text.PLUS_MINUS} {', '.join(errors)}"
    return Entry(text.signed(difference.mean), note=note)


def _paper_names(pair: PairSummary) -> list[str]:
    names = list(pair.pair.paper or ())
    bases = [base for name in names[:1] if (base := paper_base(name)) is not None]
    return [*bases, *names]
