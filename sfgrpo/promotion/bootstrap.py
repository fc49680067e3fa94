"""Paired bootstrap over the prompts of every task; those that ask for the same are drawn together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from sfgrpo.types import TAGS, Tag

Floats = NDArray[np.floating[Any]]

DECIMALS = 12
"""Of a bound, so that a difference of 0 is 0 however its terms were rounded on the way."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its two one-sided bounds, which are infinite where its error is unknown."""

    estimate: float
    lower: float
    upper: float


def task_means(tags: Sequence[Tag], values_PJ: Floats) -> Floats:
    """Return the means of all columns over the prompts of every task that is present, in GenEval's order: [T, J]."""
    of_tag = np.asarray(tags)
    return np.stack([values_PJ[of_tag == tag].mean(axis=0) for tag in TAGS if tag in tags])


def resampled_means(
    tags: Sequence[Tag],
    values_PJ: Floats,
    num_resamples: int,
    generator: np.random.Generator,
    requests: Sequence[Hashable] | None = None,
) -> Floats:
    """Return the means of every task over prompts drawn from it with replacement, `num_resamples` times: [R, T, J].

    A drawn prompt brings its whole row: the images of a prompt stay together, and so do the two models. It also brings
    the prompts of its task that ask for the same, by `requests`: they succeed and fail together, and drawn one by one
    would be taken for evidence of their own (the bootstrap of clusters; Davison and Hinkley, Bootstrap Methods and
    Their Application, 1997, section 3.8). By default every prompt asks for something else.

    Of n clusters n - 1 are drawn, because then the variance of the resampled means is the squared standard error s^2 /
    n itself, while n draws give (n - 1) / n of it (Rao and Wu, Resampling Inference With Complex Survey Data, JASA 83,
    1988). A task of one cluster has an unknown error and is NaN.
    """
    of_tag = np.asarray(tags)
    tasks = [tag for tag in TAGS if tag in tags]
    means_RTJ = np.full((num_resamples, len(tasks), values_PJ.shape[1]), np.nan)
    for index, tag in enumerate(tasks):
        rows = np.flatnonzero(of_tag == tag).tolist()
        sums, sizes = _clusters(values_PJ[rows], rows if requests is None else [requests[row] for row in rows])
        num_drawn = len(sizes) - 1
        if num_drawn == 0:
            continue
        drawn = generator.integers(len(sizes), size=(num_resamples, num_drawn), dtype=np.int32)
        # One `bincount` counts the draws of all resamples: each resample has its own range of numbers.
        drawn += (np.arange(num_resamples, dtype=np.int32) * len(sizes))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_resamples * len(sizes)).reshape(num_resamples, len(sizes))
        counts = counts.astype(np.float64)
        means_RTJ[:, index] = counts @ sums / (counts @ sizes)[:, None]
    return means_RTJ


def num_independent(tags: Sequence[Tag], requests: Sequence[Hashable]) -> dict[Tag, int]:
    """Return for every task that is present how many of its prompts ask for different things."""
    asked = {tag: {key for of_tag, key in zip(tags, requests, strict=True) if of_tag == tag} for tag in TAGS}
    return {tag: len(keys) for tag, keys in asked.items() if keys}


def _clusters(values_PJ: Floats, requests: Iterable[Hashable]) -> tuple[Floats, Floats]:
    """Return the sums over prompts of one request, [C, J], and their numbers, [C], in the order of their first."""
    numbers: dict[Hashable, int] = {}
    cluster_P = [numbers.setdefault(request, len(numbers)) for request in requests]
    sums = np.zeros((len(numbers), values_PJ.shape[1]))
    np.add.at(sums, cluster_P, values_PJ)
    return sums, np.bincount(cluster_P).astype(np.float64)


def expanded(tail: float, degrees: int) -> float:
    """Return the tail of the normal distribution that begins where `tail` of Student's t with `degrees` begins.

    With 12 prompts in each of six tasks, a task would otherwise be called worse by chance in 12 % of comparisons
    instead of 5 %; with 100 it matters little (the expanded percentile interval of Hesterberg, What Teachers Should
    Know About the Bootstrap, The American Statistician 69, 2015). A tail smaller than one resample begins at the
    outermost one.
    """
    return float(ndtr(stdtrit(degrees, tail))) if degrees > 0 else tail


def interval(estimate: float, resampled_R: Floats, tail: float) -> Interval:
    """Bound an estimate by the values that a share `tail` of its resamples lies below, and as many above.

    The bounds are order statistics, without interpolation between the few values that a difference of verdicts has.
    """
    if np.isnan(resampled_R).any():
        return Interval(estimate=float(estimate), lower=-math.inf, upper=math.inf)
    bounds = np.quantile(resampled_R, [tail, 1.0 - tail], method="inverted_cdf")
    # Adding 0 turns -0 into 0.
    lower, upper = (float(bound) + 0.0 for bound in bounds.round(DECIMALS))
    return Interval(estimate=float(estimate), lower=lower, upper=upper)
