"""The report of a study, as one HTML page that needs nothing else and as Markdown for the documentation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from sfgrpo.study import tables
from sfgrpo.study.figures import slug
from sfgrpo.study.metrics import WINDOW
from sfgrpo.study.results import Run, final_values
from sfgrpo.study.summary import CHEAPEST_COST_TARGET, COST_TARGETS, TARGETS, Summary
from sfgrpo.study.text import reward_name


def html(summary: Summary, drawings: Mapping[str, str]) -> str:
    """Return the page, with the SVG `drawings` inside it."""
    figures = {name: Markup(inlined(svg, name)) for name, svg in drawings.items()}
    return _rendered("page.html", summary, figures)


def markdown(summary: Summary, figures: Collection[str]) -> str:
    """Return the page as Markdown, with a link to each figure that is in `figures` by name."""
    text = _rendered("page.md", summary, figures)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def inlined(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page: as wide as its parent, with identifiers unique to the figure."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    return f'{head} role="img" aria-label="{name.replace("_", " ")}">{body}'


def facts_of(summary: Summary) -> dict[str, str]:
    """Return how the numbers came about, by topic."""
    cost_targets = ", ".join(f"{target:.1f} with {substeps} substeps" for substeps, target in COST_TARGETS.items())
    pair_runs = [run for pair in summary.pairs for run in pair.runs]
    facts = {
        "The measure": (
            "For every seed, the first update at which Stepwise reaches the reward of Flow-GRPO's last evaluation, "
            "over the first at which Flow-GRPO itself does, interpolated between evaluations. Both curves are first "
            "made monotone by isotonic regression, since a first crossing of a noisy curve rewards noise. Rewards are "
            "those of fixed prompts on the training sampler. The median over seeds counts a seed that never arrives "
            f"as infinite. Targets: {TARGETS['updates']:.2f} of the updates, {TARGETS['seconds']:.2f} of the compute "
            "seconds."
        ),
        "Compute seconds": (
            "Updates times the row's median seconds of an update, over updates and seeds, without evaluation. "
            f"Targets for the cost of an update: {cost_targets}, {CHEAPEST_COST_TARGET:.1f} for the cheapest row."
        ),
        "Spread": (
            "Means and sample standard deviations over seeds; bands are one standard deviation. A difference is "
            "beyond the spread if the 95 % interval of the paired differences (Student's t) excludes 0. "
            "With few seeds that is a strict rule."
        ),
        "Thin lines": f"Mean reward of the images trained on, running mean of {WINDOW} updates; their prompts differ.",
        "Seeds": _distinct(summary.plan.seeds),
        "Updates": _distinct(run.num_updates for run in summary.runs),
        "Images of an update": _distinct(run.images_per_update for run in summary.runs),
        "Sampler of the pairs": _distinct(f"{run.sampler}, {run.num_steps} steps" for run in pair_runs),
        "Evaluation": _distinct(map(_evaluation_of, summary.runs)),
        "Error of one evaluation": _error_of(pair_runs),
        "Versions": _distinct(f"{name} {version}" for run in summary.runs for name, version in run.versions.items()),
    }
    return {name: text for name, text in facts.items() if text}


def _rendered(template: str, summary: Summary, figures: Collection[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        summary=summary,
        figures=figures,
        facts=facts_of(summary),
        tables=tables,
        slug=slug,
        reward_name=reward_name,
    )


def _evaluation_of(run: Run) -> str:
    prompts = sum(int(value) for name, value in run.params.items() if name.startswith("prompts.num_evaluation."))
    images, steps = run.params["evaluation.images_per_prompt"], run.params["evaluation.num_steps"]
    asked = f"{prompts} prompts, " if prompts else ""
    return f"{asked}{images} images each, {steps} noise-free steps; prompts and noise are the same for all rows"


def _error_of(runs: Iterable[Run]) -> str:
    finals = final_values(runs, "geneval/overall_stderr").values()
    if not finals:
        return ""
    return f"{statistics.median(finals):.3f} in GenEval overall, clustered by prompt: the median over the pairs' runs."


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
