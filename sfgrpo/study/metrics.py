"""The numbers of a study: curves, when one reaches another's end, differences over seeds, cost of an update."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

PHASES = ("rollout", "estimates", "decode", "reward", "update")
"""Phases of an update whose seconds count as its cost."""
WINDOW = 10
"""Updates that a running mean covers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A mean over seeds; the sample standard deviation is NaN for a single seed."""

    mean: float
    std: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One row minus another, over the seeds that both have; the errors are NaN for a single seed."""

    per_seed: Mapping[int, float]
    mean: float
    std: float
    """Sample standard deviation of the paired differences."""
    paired_stderr: float
    pooled_stderr: float
    """sqrt(var_a / n + var_b / n), as if seeds were not shared."""

    @property
    def interval(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t on the paired differences."""
        count = len(self.per_seed)
        return float(stdtrit(count - 1, 0.975)) * self.paired_stderr if count > 1 else math.nan

    @property
    def is_beyond_spread(self) -> bool:
        """Whether the 95 % interval excludes 0; never for a single seed."""
        return abs(self.mean) > self.interval

    @property
    def is_same_sign(self) -> bool:
        """Whether no two seeds disagree on which row is higher, and one decides."""
        return len({math.copysign(1.0, value) for value in self.per_seed.values() if value}) == 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When two rows of one seed first reach the value at which the second of them ends."""

    target: float
    candidate: float | None
    """None if the target is never reached."""
    baseline: float

    @property
    def ratio(self) -> float:
        """Candidate's time over the baseline's: infinite if it never arrives, NaN if the baseline does not rise."""
        if self.baseline <= 0.0:
            return math.nan
        return math.inf if self.candidate is None else self.candidate / self.baseline

    def scaled(self, candidate: float, baseline: float) -> Reach:
        """Convert the unit of time, such as updates to seconds, by one factor for each row."""
        reached = None if self.candidate is None else self.candidate * candidate
        return Reach(target=self.target, candidate=reached, baseline=self.baseline * baseline)


def running_mean(values: ArrayLike, window: int = WINDOW) -> NDArray[np.float64]:
    """Return the mean of the last `window` values at every place, of fewer at the start."""
    array = np.asarray(values, dtype=np.float64)
    sums: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(array)])
    stops = np.arange(1, len(array) + 1)
    starts = np.maximum(stops - window, 0)
    return np.asarray((sums[stops] - sums[starts]) / (stops - starts))


def spread(values: Iterable[float]) -> Spread:
    """Return mean and sample standard deviation; both NaN without values."""
    array = np.fromiter(values, dtype=np.float64)
    return Spread(
        mean=float(array.mean()) if array.size else math.nan,
        std=float(array.std(ddof=1)) if array.size > 1 else math.nan,
    )


def difference(rows: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Compare two rows, values by seed, over the seeds of both; None if they share none."""
    seeds = [seed for seed in rows if seed in others]
    if not seeds:
        return None
    per_seed = {seed: rows[seed] - others[seed] for seed in seeds}
    paired = spread(per_seed.values())
    stds = [spread(values[seed] for seed in seeds).std for values in (rows, others)]
    return Difference(
        per_seed=per_seed,
        mean=paired.mean,
        std=paired.std,
        paired_stderr=paired.std / math.sqrt(len(seeds)),
        pooled_stderr=math.hypot(*stds) / math.sqrt(len(seeds)),
    )


def first_reached(updates: ArrayLike, values: ArrayLike, target: float) -> float | None:
    """Return the first update, interpolated between evaluations, at which a curve reaches a target; None if never."""
    at = np.asarray(updates, dtype=np.float64)
    curve = np.asarray(values, dtype=np.float64)
    reached = np.flatnonzero(curve >= target)
    if not reached.size:
        return None
    after = int(reached[0])
    if after == 0:
        return float(at[0])
    share = (target - curve[after - 1]) / (curve[after] - curve[after - 1])
    return float(at[after - 1] + share * (at[after] - at[after - 1]))


def reach(updates: ArrayLike, values: ArrayLike, baseline_updates: ArrayLike, baseline_values: ArrayLike) -> Reach:
    """Return when a curve, and the baseline itself, first reach the baseline's last value, both made monotone.

    A noisy curve has peaks that it does not hold, and a last value that is as noisy as any other; the first crossing
    of a raw curve would reward noise. The rising curve nearest to it in least squares has neither.
    """
    rising = isotonic_regression(np.asarray(baseline_values, dtype=np.float64)).x
    target = float(rising[-1])
    own = first_reached(baseline_updates, rising, target)
    assert own is not None, "a curve reaches its own last value"
    candidate = isotonic_regression(np.asarray(values, dtype=np.float64)).x
    return Reach(target=target, candidate=first_reached(updates, candidate, target), baseline=own)


def median_ratio(ratios: Iterable[float]) -> float:
    """Return the median: a seed that never arrives counts as infinite, NaN is left out; NaN without ratios."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return statistics.median(known) if known else math.nan


def gain_magnitudes(history: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Return the mean absolute gain of every step over a history; empty without stepwise credit."""
    names = sorted(
        {name for entry in history for name in entry if name.startswith("gain/") and name.endswith("/abs_mean")}
    )
    return np.array([np.mean([entry[name] for entry in history if name in entry]) for name in names], dtype=np.float64)
