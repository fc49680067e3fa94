"""The numbers of a study: curves, when one reaches another's end, differences over seeds, cost of an update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

WINDOW = 10
PHASES = ("rollout", "estimates", "decode", "reward", "update")

UPDATES_TARGET = 0.5
SECONDS_TARGET = 0.8
COST_TARGET = 1.7
COST_TARGET_SUBSTEPS = 5
CHEAPEST_COST_TARGET = 1.3

# Student's t for 1, 2, ... degrees of freedom, 95 % two-sided.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A mean over seeds; the sample standard deviation is NaN for a single seed."""

    mean: float
    std: float
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one row is above another, over the seeds that both have; the errors are NaN for a single seed."""

    per_seed: Mapping[int, float]
    mean: float
    std: float
    """Sample standard deviation of the paired differences."""
    paired_stderr: float
    pooled_stderr: float
    """sqrt(var_a / n + var_b / n), as if seeds were not shared."""

    @property
    def interval(self) -> float:
        """Half of the 95 % interval of the mean, from the paired differences."""
        count = len(self.per_seed)
        return T_95[min(count - 2, len(T_95) - 1)] * self.paired_stderr if count > 1 else math.nan

    @property
    def is_beyond_spread(self) -> bool:
        """Whether the 95 % interval leaves 0 out; never for a single seed."""
        return abs(self.mean) > self.interval

    @property
    def is_same_sign(self) -> bool:
        """Whether all seeds agree on who is higher."""
        return len({math.copysign(1.0, value) if value else 0.0 for value in self.per_seed.values()} - {0.0}) == 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When two rows of one seed first reach the value at which the second of them ends."""

    target: float
    candidate: float | None
    """None where it is never reached."""
    baseline: float

    @property
    def ratio(self) -> float:
        """Share of the baseline's time that the candidate needs; NaN if the baseline ends no higher than it starts."""
        if self.baseline <= 0.0:
            return math.nan
        return math.inf if self.candidate is None else self.candidate / self.baseline

    def scaled(self, candidate: float, baseline: float) -> Reach:
        """Changes the unit of time, such as from updates to seconds."""
        reached = None if self.candidate is None else self.candidate * candidate
        return Reach(target=self.target, candidate=reached, baseline=self.baseline * baseline)


def running_mean(values: ArrayLike, window: int = WINDOW) -> NDArray[np.float64]:
    """Gives the mean of the last `window` values at every place, of those there are at the start."""
    array = np.asarray(values, dtype=np.float64)
    sums: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(array)])
    stops = np.arange(1, len(array) + 1)
    starts = np.maximum(stops - window, 0)
    return np.asarray((sums[stops] - sums[starts]) / (stops - starts))


def spread(values: Iterable[float]) -> Spread:
    """Gives mean and sample standard deviation; all NaN of nothing."""
    array = np.fromiter(values, dtype=np.float64)
    return Spread(
        mean=float(array.mean()) if array.size else math.nan,
        std=float(array.std(ddof=1)) if array.size > 1 else math.nan,
        count=array.size,
    )


def difference(rows: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Compares two rows, values by seed, over the seeds of both; None without one."""
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
    """Gives the first update, interpolated between evaluations, at which a curve reaches a target; None if never."""
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
    """Gives when a curve, and the baseline itself, first reach the baseline's last value, both made rising.

    A noisy curve has peaks that it does not hold and a last value that is as noisy as any other; the first crossing of
    a raw curve would reward noise. The rising curve nearest to it in least squares has neither.
    """
    rising = isotonic_regression(np.asarray(baseline_values, dtype=np.float64)).x
    target = float(rising[-1])
    own = first_reached(baseline_updates, rising, target)
    assert own is not None, "a curve reaches its own last value"
    candidate = isotonic_regression(np.asarray(values, dtype=np.float64)).x
    return Reach(target=target, candidate=first_reached(updates, candidate, target), baseline=own)


def median_ratio(ratios: Iterable[float]) -> float:
    """Gives the median; a seed that never arrives is infinite, one without a ratio is left out, NaN of nothing."""
    known = sorted(ratio for ratio in ratios if not math.isnan(ratio))
    if not known:
        return math.nan
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2.0


def seconds_of_updates(
    histories: Iterable[Sequence[Mapping[str, float]]], phase: str | None = None
) -> NDArray[np.float64]:
    """Lists the seconds of every update of every history, in one phase or in all of them."""
    names = PHASES if phase is None else (phase,)
    seconds = [sum(entry.get(f"time/{name}_s", 0.0) for name in names) for history in histories for entry in history]
    return np.array(seconds, dtype=np.float64)


def median_seconds(histories: Iterable[Sequence[Mapping[str, float]]], phase: str | None = None) -> float:
    """Gives the median seconds of an update, which a slow moment of the machine does not move; NaN of nothing."""
    seconds = seconds_of_updates(histories, phase)
    return float(np.median(seconds)) if seconds.size else math.nan


def gain_magnitudes(history: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Gives the mean absolute gain of every step over the updates of a history; empty without stepwise credit."""
    names = sorted(
        {name for entry in history for name in entry if name.startswith("gain/") and name.endswith("/abs_mean")}
    )
    return np.array([np.mean([entry[name] for entry in history if name in entry]) for name in names], dtype=np.float64)
