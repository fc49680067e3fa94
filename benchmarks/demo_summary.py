"""Gains of the demo over several seeds: mean, spread, and which tasks moved by more than their standard error."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfgrpo.geneval.table import COLUMNS
from sfgrpo.types import TAGS

OVERALL = "overall"
OTHER = ("agreement/", "evaluation/", "geneval/confirmed")
"""Prefixes of the metrics that are summarised beside overall score and tasks."""
NO_SCORE = ("_stderr", "/num_images")
TRAINED = ("last", "best")
"""Adapter of the last update, and that of the update with the best score on the validation prompts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """What one run of the demo measured."""

    seed: int
    minutes: float
    """Of prompts, training and evaluation."""
    models: Mapping[str, Mapping[str, float]]
    """Metrics of `base`, `last` and `best`, all on the same prompts and noise."""

    def change(self, model: str, metric: str) -> float:
        """Return how far a metric of a model lies above that of the base model."""
        return self.models[model][metric] - self.models["base"][metric]


def summarise_seeds(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Return all that was measured, with mean, standard deviation and standard error of every gain over the seeds.

    Gains are taken within a seed, whose models share prompts and noise. One seed has no spread: None.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("no result of any seed; run one by `python -m benchmarks.demo --seeds 0 --out FOLDER`")
    metrics = [f"geneval/{name}" for name in (OVERALL, *TAGS)]
    shared = set.intersection(*(set(metrics) for result in results for metrics in result.models.values()))
    other = sorted(name for name in shared if name.startswith(OTHER) and not name.endswith(NO_SCORE))
    gains = {
        model: {name: _spread(result.change(model, name) for result in results) for name in (*metrics, *other)}
        for model in TRAINED
    }
    return {
        "seeds": [dataclasses.asdict(result) for result in results],
        "minutes": _spread(result.minutes for result in results),
        "means": {
            model: {name: statistics.fmean(result.models[model][name] for result in results) for name in gains["last"]}
            for model in ("base", *TRAINED)
        },
        "gains": gains,
        "beyond_standard_error": {
            model: {
                "up": [tag for tag in TAGS if _direction(gains[model][f"geneval/{tag}"]) > 0],
                "down": [tag for tag in TAGS if _direction(gains[model][f"geneval/{tag}"]) < 0],
            }
            for model in TRAINED
        },
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """Return a summary as Markdown: the seeds, the tasks, the other metrics, and what moved beyond its error."""
    num_seeds = len(summary["seeds"])
    title = f"Demo over {num_seeds} seed{'s' * (num_seeds != 1)}, commit {summary['commit'][:12]}"
    beyond = []
    for model in TRAINED:
        moved = summary["beyond_standard_error"][model]
        up, down = (", ".join(COLUMNS[tag] for tag in moved[way]) or "none" for way in ("up", "down"))
        beyond.append(
            f"- {model} adapter: {len(moved['up'])} of {len(TAGS)} tasks up by more than the standard error ({up}), "
            f"{len(moved['down'])} down ({down})"
        )
    names = list(summary["means"]["base"])
    tasks, others = ([name for name in names if name.startswith(OTHER) is is_other] for is_other in (False, True))
    parts = [f"# {title}", _seed_table(summary), _gain_table(summary, tasks), "\n".join(beyond)]
    if others:
        parts.append(_gain_table(summary, others))
    return "\n\n".join(parts) + "\n"


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation, and standard error of the mean."""
    known = list(values)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(known))
    return {"mean": statistics.fmean(known), "std": deviation, "stderr": error}


def _direction(gain: Mapping[str, float | None]) -> int:
    """Return 1 or -1 where the mean lies beyond one standard error above or below 0, else 0."""
    mean, error = gain["mean"], gain["stderr"]
    if mean is None or error is None or abs(mean) <= error:
        return 0
    return 1 if mean > 0 else -1


def _seed_table(summary: Mapping[str, Any]) -> str:
    header = ["Seed", "Base", "Last", "Best", "Gain of last", "Gain of best", "Minutes"]
    name = f"geneval/{OVERALL}"
    rows = []
    for seed in summary["seeds"]:
        base, last, best = (seed["models"][model][name] for model in ("base", *TRAINED))
        cells = [f"{value:.3f}" for value in (base, last, best)] + [f"{value - base:+.3f}" for value in (last, best)]
        rows.append([str(seed["seed"]), *cells, f"{seed['minutes']:.1f}"])
    means = [f"{summary['means'][model][name]:.3f}" for model in ("base", *TRAINED)]
    gains = [_with_deviation(summary["gains"][model][name]) for model in TRAINED]
    rows.append(["mean", *means, *gains, f"{summary['minutes']['mean']:.1f}"])
    return _table(header, rows)


def _gain_table(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the table of some metrics; a triangle marks what moved by more than its standard error."""
    header = ["Metric", "Base", "Last", "Best"]
    header += [f"{title} of {model}" for model in TRAINED for title in ("Gain", "Standard error")]
    rows = []
    titles = {f"geneval/{tag}": column for tag, column in COLUMNS.items()} | {f"geneval/{OVERALL}": "Overall"}
    for name in names:
        row = [titles.get(name, name)]
        row += [f"{summary['means'][model][name]:.3f}" for model in ("base", *TRAINED)]
        for model in TRAINED:
            gain = summary["gains"][model][name]
            mark = {1: " ▲", 0: "", -1: " ▼"}[_direction(gain)]
            row += [_with_deviation(gain) + mark, "-" if gain["stderr"] is None else f"{gain['stderr']:.3f}"]
        rows.append(row)
    return _table(header, rows)


def _with_deviation(gain: Mapping[str, float | None]) -> str:
    return f"{gain['mean']:+.3f}" + ("" if gain["std"] is None else f" ± {gain['std']:.3f}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
