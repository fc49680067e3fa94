"""Numbers and findings in words; a sentence claims no more than its numbers carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from sfgrpo.study.metrics import SECONDS_TARGET, UPDATES_TARGET, Difference, Spread, spread
from sfgrpo.study.summary import AblationSummary, PairSummary, Sampler, Summary, Unit

NO_DIFFERENCE = "no difference beyond the spread"
NOT_REACHED = "not reached"
DASH = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ROUNDING = 1e-9
REWARDS = {"clip": "CLIP", "geneval": "GenEval", "geneval_correct": "strict GenEval", "pickscore": "PickScore"}


def reward_name(name: str) -> str:
    """Gives a reward's name as one writes it."""
    return REWARDS.get(name, name)


def number(value: float | None, digits: int = 2) -> str:
    """Writes a number; a dash for none."""
    if value is None or math.isnan(value):
        return DASH
    return f"{_unsigned_zero(value, digits):.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Writes a number with its sign; what rounds to zero has none."""
    if math.isnan(value) or _unsigned_zero(value, digits) == 0.0:
        return number(value, digits)
    return f"{value:+.{digits}f}".replace("-", MINUS)


def digits_for(spreads: Iterable[float], least: int = 3, most: int = 5) -> int:
    """Gives the decimals with which the largest of some spreads has two digits that count."""
    largest = max((one for one in spreads if one > 0.0), default=1.0)
    return min(max(1 - math.floor(math.log10(largest)), least), most)


def ratio(value: float) -> str:
    """Writes a share of another row's time."""
    if math.isinf(value):
        return NOT_REACHED
    return "no rise" if math.isnan(value) else number(value)


def spread_of(one: Spread, digits: int = 2) -> str:
    """Writes a mean with the standard deviation over seeds, without it where all seeds agree or there is one."""
    mean = number(one.mean, digits)
    return mean if math.isnan(one.std) or one.std < ROUNDING else f"{mean} {PLUS_MINUS} {number(one.std, digits)}"


def difference_of(one: Difference, digits: int = 3) -> str:
    """Writes a mean paired difference with its standard deviation over seeds."""
    mean = signed(one.mean, digits)
    return mean if math.isnan(one.std) else f"{mean} {PLUS_MINUS} {number(one.std, digits)}"


def judged(one: Difference) -> str:
    """Says whether a difference is one."""
    direction = "higher" if one.mean > 0.0 else "lower"
    count = len(one.per_seed)
    if count == 1:
        return "one seed, no spread to judge by"
    if one.is_beyond_spread:
        return f"{direction}, beyond the spread"
    if one.is_same_sign:
        return f"{direction} in {'both' if count == 2 else f'all {count}'} seeds, yet within the spread"
    return NO_DIFFERENCE


def mark(is_met: bool) -> str:
    """Says whether a target is met."""
    return "met" if is_met else "missed"


def listed(items: Iterable[object]) -> str:
    """Joins items as in a sentence."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def counted(count: int, noun: str) -> str:
    """Writes a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def finding(summary: Summary) -> str:
    """Says in one paragraph what a study found."""
    pairs = [pair for pair in summary.pairs if pair.ratio("noisy", "updates") is not None]
    if not pairs:
        return (
            f"No pair has a seed with both methods yet: there is nothing to compare. {_completeness(summary)}".strip()
        )
    sentences = (*_speed(pairs), _check(pairs), _geneval(pairs), _cost(pairs), _completeness(summary))
    return " ".join(sentence for sentence in sentences if sentence)


def answer(one: AblationSummary) -> str:
    """Answers the question of an ablation in one line."""
    compared = [(row.label, row.difference) for row in one.rows if row.difference is not None]
    if not compared:
        return "No answer yet: there are no two rows to compare."
    digits = ablation_digits(one)
    values = [f"{label} {difference_of(gap, digits)}" for label, gap in compared]
    verdicts = [judged(gap) for _, gap in compared]
    if set(verdicts) == {NO_DIFFERENCE}:
        return f"{NO_DIFFERENCE.capitalize()}. Against {one.rows[0].label}: {listed(values)}."
    parts = [f"{value} ({verdict})" for value, verdict in zip(values, verdicts, strict=True)]
    return f"Against {one.rows[0].label}: {'; '.join(parts)}."


def ablation_digits(one: AblationSummary) -> int:
    """Gives the decimals of an ablation's rewards."""
    return digits_for(spread(row.finals.values()).std for row in one.rows)


def _speed(pairs: Sequence[PairSummary]) -> Iterable[str]:
    updates = _medians(pairs, "noisy", "updates")
    seconds = _medians(pairs, "noisy", "seconds")
    reached = [title for title, median in updates.items() if math.isfinite(median)]
    if reached:
        shares = listed(f"{updates[title]:.2f} ({title})" for title in reached)
        yield (
            f"Stepwise-Flow-GRPO reaches the training reward at which Flow-GRPO ends after {shares} of Flow-GRPO's "
            f"updates, {_medians_over(pairs)}: {_verdict(updates, UPDATES_TARGET)}."
        )
        of_seconds = listed(f"{seconds[title]:.2f}" for title in reached)
        yield f"In compute seconds that is {of_seconds} of Flow-GRPO's: {_verdict(seconds, SECONDS_TARGET)}."
    if unreached := [title for title, median in updates.items() if math.isinf(median)]:
        yield f"Stepwise-Flow-GRPO does not reach Flow-GRPO's final training reward with {listed(unreached)}."
    if flat := [title for title, median in updates.items() if math.isnan(median)]:
        yield f"Flow-GRPO ends no higher than it starts with {listed(flat)}, so there is no ratio."


def _medians(pairs: Sequence[PairSummary], sampler: Sampler, unit: Unit) -> dict[str, float]:
    found = {pair.pair.title: pair.ratio(sampler, unit) for pair in pairs}
    return {title: one.median for title, one in found.items() if one is not None}


def _medians_over(pairs: Sequence[PairSummary]) -> str:
    counts = {len(one.reaches) for pair in pairs if (one := pair.ratio("noisy", "updates")) is not None}
    seeds = counted(counts.pop(), "seed") if len(counts) == 1 else "the seeds at hand"
    return f"{'median' if len(pairs) == 1 else 'medians'} over {seeds}"


def _verdict(medians: Mapping[str, float], target: float) -> str:
    met = sum(median <= target for median in medians.values())
    if len(medians) == 1:
        return f"the target of {target:.2f} is {mark(met == 1)}"
    where = "none" if met == 0 else "all" if met == len(medians) else str(met)
    return f"the target of {target:.2f} is met in {where} of {counted(len(medians), 'pair')}"


def _check(pairs: Sequence[PairSummary]) -> str:
    medians = [ratio(median) for median in _medians(pairs, "noise-free", "updates").values()]
    verb = "share of updates is" if len(medians) == 1 else "shares of updates are"
    return f"Judged on the noise-free sampler the {verb} {listed(medians)}." if medians else ""


def _geneval(pairs: Sequence[PairSummary]) -> str:
    found = [pair.geneval["overall"] for pair in pairs if "overall" in pair.geneval]
    values = listed(f"{difference_of(one)} ({judged(one)})" for one in found)
    return f"Final GenEval differs from Flow-GRPO's by {values}." if found else ""


def _cost(pairs: Sequence[PairSummary]) -> str:
    costs = [f"{pair.cost:.2f}" for pair in pairs if not math.isnan(pair.cost)]
    return f"An update costs {listed(costs)} times as much." if costs else ""


def _completeness(summary: Summary) -> str:
    if not summary.missing:
        return ""
    verb = "is" if len(summary.missing) == 1 else "are"
    return f"{len(summary.missing)} of {counted(summary.planned, 'planned run')} {verb} missing: this is preliminary."


def _unsigned_zero(value: float, digits: int) -> float:
    return 0.0 if round(value, digits) == 0.0 else value
