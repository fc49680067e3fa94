"""Writes the report of a study to its folder and into the MLflow run that is the parent of its runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfgrpo.errors import SfgrpoError
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.shutdown import sigterm_as_exit
from sfgrpo.study.config import Plan
from sfgrpo.study.figures import figures_of, svg_of
from sfgrpo.study.page import curves, markdown, write_page
from sfgrpo.study.results import load_results
from sfgrpo.study.run import STUDY, parent_run
from sfgrpo.tracking.base import ending

REPORTS = Path("reports/study")
PLOTTED = {"training_sampler": "evaluation_noisy/", "noise_free": "evaluation/", "geneval": "geneval/overall"}
"""Files for `dvc plots`, with the metric that each holds; a metric that ends in "/" is that of the training reward."""


def write_report(plan: Plan, environment: Environment) -> None:
    """Reads the runs that are done, writes page, figures, Markdown and plots, and logs them."""
    runs = STUDY / plan.preset
    if not runs.exists():
        raise SfgrpoError(f"{runs} does not exist; `make study FORM={plan.preset}` fills it")
    results = load_results(runs)
    figures = figures_of(plan, results)
    drawings = {name: svg_of(figure) for name, figure in figures.items()}
    words = markdown(plan, results, figures)
    with atomic_directory(REPORTS / plan.preset) as partial:
        write_page(plan, results, partial / "report.html")
        (partial / "results.md").write_text(words, encoding="utf-8")
        (partial / "figures").mkdir()
        for name, drawing in drawings.items():
            (partial / "figures" / f"{name}.svg").write_text(drawing, encoding="utf-8")
        for name, records in _plots(curves(plan, results)).items():
            (partial / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        page = (partial / "report.html").read_text(encoding="utf-8")
    with sigterm_as_exit(), ending(parent_run(plan, environment)) as tracker:
        tracker.log_text(page, "report.html")
        tracker.log_text(words, "results.md")
        for name, drawing in drawings.items():
            tracker.log_text(drawing, f"figures/{name}.svg")
    print(f"report in {REPORTS / plan.preset / 'report.html'}")


def _plots(records: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Turns tidy records of row, seed, update and metrics into the means over seeds that `dvc plots` draws."""
    sums: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in PLOTTED}
    for record in records:
        for name, metric in PLOTTED.items():
            value = record.get(metric + str(record["reward"]) if metric.endswith("/") else metric)
            if value is not None:
                sums[name].setdefault(record["update"], defaultdict(list))[record["row"]].append(value)
    return {
        name: [
            {"update": update, **{row: sum(values) / len(values) for row, values in rows.items()}}
            for update, rows in sorted(updates.items())
        ]
        for name, updates in sums.items()
    }
