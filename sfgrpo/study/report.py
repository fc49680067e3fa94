"""Writes the report of a study to its folder and into the MLflow run that is the parent of its runs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from sfgrpo.errors import SfgrpoError
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.study.config import Plan
from sfgrpo.study.figures import draw_figures, svg_of
from sfgrpo.study.page import html, markdown
from sfgrpo.study.results import Run, load_results, mean_curve
from sfgrpo.study.run import STUDY, parent_run
from sfgrpo.study.summary import Summary, summarise
from sfgrpo.tracking.base import ending

REPORTS = Path("reports/study")
PLOTS = {
    "training_sampler": "evaluation_noisy/{reward}",
    "noise_free": "evaluation/{reward}",
    "geneval": "geneval/overall",
}
"""Files for `dvc plots`, with the metric that each holds."""


def write_report(plan: Plan, environment: Environment) -> None:
    """Write page, figures, Markdown and plots of the finished runs, and log them."""
    folder, report = STUDY / plan.preset, REPORTS / plan.preset
    if not folder.exists():
        raise SfgrpoError(f"{folder} does not exist; `make study FORM={plan.preset}` fills it")
    summary = summarise(plan, load_results(folder))
    drawings = {name: svg_of(figure) for name, figure in draw_figures(summary).items()}
    texts = {"report.html": html(summary, drawings), "results.md": markdown(summary, drawings)}
    texts |= {f"figures/{name}.svg": drawing for name, drawing in drawings.items()}
    plots = {f"{name}.json": json.dumps(records, indent=1) + "\n" for name, records in plots_of(summary).items()}
    with atomic_directory(report) as partial:
        (partial / "figures").mkdir()
        for name, text in (texts | plots).items():
            (partial / name).write_text(text, encoding="utf-8")
    with ending(parent_run(plan, environment)) as tracker:
        for name, text in texts.items():
            tracker.log_text(text, name)
    print(f"report in {report / 'report.html'}")


def plots_of(summary: Summary) -> dict[str, list[dict[str, float]]]:
    """Return the records of each file for `dvc plots`: for every update, every row's mean over seeds."""
    rows: dict[str, list[Run]] = defaultdict(list)
    for run in summary.runs:
        rows[run.row].append(run)
    plots = {}
    for name, metric in PLOTS.items():
        records: dict[int, dict[str, float]] = defaultdict(dict)
        for row, runs in rows.items():
            if mean := mean_curve(runs, metric.format(reward=runs[0].reward)):
                for update, value in zip(mean.updates, mean.means, strict=True):
                    records[int(update)][row] = float(value)
        plots[name] = [{"update": update, **values} for update, values in sorted(records.items())]
    return plots
