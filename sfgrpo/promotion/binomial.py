"""Exact bounds of a share."""

from __future__ import annotations

import math

from scipy.special import betaincinv

from sfgrpo.promotion.bootstrap import Interval


def share_interval(successes: int, trials: int, tail: float) -> Interval:
    """Bound the probability of a success by `successes` of `trials`, each bound with an error rate of `tail`.

    The bounds are those of Clopper and Pearson (The Use of Confidence or Fiducial Limits Illustrated in the Case of the
    Binomial, Biometrika 26, 1934), which hold for any number of trials; without trials the estimate is NaN, and the
    bounds say nothing.
    """
    return Interval(
        estimate=successes / trials if trials else math.nan,
        lower=float(betaincinv(successes, trials - successes + 1, tail)) if successes else 0.0,
        upper=float(betaincinv(successes + 1, trials - successes, 1.0 - tail)) if successes < trials else 1.0,
    )
