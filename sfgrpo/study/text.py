"""Numbers as a report prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sfgrpo.study.metrics import Difference, Spread

DASH = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ROUNDING = 1e-9
REWARDS = {"clip": "CLIP", "geneval": "GenEval", "geneval_correct": "GenEval verdict", "pickscore": "PickScore"}


def reward_name(name: str) -> str:
    """Return a reward's name as people write it."""
    return REWARDS.get(name, name)


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; a dash for none."""
    if value is None or math.isnan(value):
        return DASH
    return f"{_unsigned_zero(value, digits):.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Format a number with its sign; without one if it rounds to zero."""
    if math.isnan(value) or _unsigned_zero(value, digits) == 0.0:
        return number(value, digits)
    return f"{value:+.{digits}f}".replace("-", MINUS)


def digits_for(stds: Iterable[float], least: int = 3, most: int = 5) -> int:
    """Return the decimals that show two significant digits of the largest standard deviation."""
    largest = max((std for std in stds if std > 0.0), default=1.0)
    return min(max(1 - math.floor(math.log10(largest)), least), most)


def ratio(value: float) -> str:
    """Format a share of another row's time."""
    if math.isinf(value):
        return "not reached"
    return "no rise" if math.isnan(value) else number(value)


def factor(value: float) -> str:
    """Format a multiple of another row's cost."""
    return DASH if math.isnan(value) else f"{TIMES}{value:.2f}"


def spread_of(spread: Spread, digits: int = 2) -> str:
    """Format a mean with the standard deviation over seeds, if there is one above zero."""
    mean = number(spread.mean, digits)
    if math.isnan(spread.std) or spread.std < ROUNDING:
        return mean
    return f"{mean} {PLUS_MINUS} {number(spread.std, digits)}"


def difference_of(difference: Difference, digits: int = 3) -> str:
    """Format a mean paired difference with its standard deviation over seeds."""
    mean = signed(difference.mean, digits)
    return mean if math.isnan(difference.std) else f"{mean} {PLUS_MINUS} {number(difference.std, digits)}"


def significance(difference: Difference) -> str:
    """Describe whether a difference is significant."""
    if len(difference.per_seed) == 1:
        return "one seed"
    if difference.is_beyond_spread:
        return "beyond the spread"
    return "within the spread, same sign in all seeds" if difference.is_same_sign else "within the spread"


def mark(is_met: bool) -> str:
    """Return whether a target is met, as a word that is also the class of its style."""
    return "met" if is_met else "missed"


def _unsigned_zero(value: float, digits: int) -> float:
    return 0.0 if round(value, digits) == 0.0 else value
