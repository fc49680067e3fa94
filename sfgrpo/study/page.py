"""A study as one HTML page that needs nothing else, as Markdown for the documentation, and as records for plots."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from sfgrpo.study.figures import draw, slug, svg_of
from sfgrpo.study.metrics import (
    CHEAPEST_COST_TARGET,
    COST_TARGET,
    COST_TARGET_SUBSTEPS,
    SECONDS_TARGET,
    UPDATES_TARGET,
    WINDOW,
    running_mean,
)
from sfgrpo.study.results import Results, Run, runs_of_row
from sfgrpo.study.summary import PairSummary, Summary, final_values, rows_of, seconds_per_update, summarise
from sfgrpo.study.tables import SAMPLERS, ablation_table, cost_table, geneval_table, ratio_table
from sfgrpo.study.text import TIMES, answer, counted, difference_of, finding, judged, listed, mark, ratio, reward_name

if TYPE_CHECKING:
    from sfgrpo.study.config import Plan


TEMPLATE = "page.html"
PACKAGES = ("torch", "diffusers", "peft", "transformers", "numpy", "matplotlib")
IMAGES = "images/study"
COMMAND = "make study"
TITLE = "Stepwise-Flow-GRPO against Flow-GRPO"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One number that a reader should take home."""

    number: str
    words: str
    target: str = ""
    mark: str = ""


def write_page(plan: Plan, results: Results, path: Path) -> None:
    """Writes the page: figures and pictures are inside it, and no number on it is anything but a measure.

    It is written plainly: a caller whose reader may come in between writes into an `atomic_directory`.
    """
    summary = summarise(plan, results)
    figures = {name: Markup(inlined(svg_of(figure), name)) for name, figure in draw(summary).items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        title=TITLE,
        summary=summary,
        finding=finding(summary),
        figures=figures,
        pairs=[
            {
                "slug": slug(pair.pair.title),
                "title": pair.pair.title,
                "keys": keys_of(pair),
                "ratios": ratio_table(pair, plan.seeds),
                "geneval": geneval_table(pair),
                "reward": reward_name((pair.flow_grpo or pair.stepwise)[0].reward)
                if pair.flow_grpo or pair.stepwise
                else "",
            }
            for pair in summary.pairs
        ],
        ablations=[
            {
                "slug": slug(one.ablation.title),
                "title": one.ablation.title,
                "question": one.ablation.question,
                "answer": answer(one),
                "sampler": SAMPLERS[one.sampler],
                "table": ablation_table(one),
            }
            for one in summary.ablations
        ],
        costs=cost_table(summary),
        missing=missing_by_row(summary),
        facts=facts_of(summary),
        command=COMMAND,
    )
    path.write_text(page, encoding="utf-8")


def markdown(plan: Plan, results: Results, figures: Collection[str]) -> str:
    """Gives the short form for the documentation, with a link to each figure that is in `figures` by name."""
    summary = summarise(plan, results)
    parts = ["# Results", finding(summary)]
    if summary.missing:
        parts.append("Missing: " + "; ".join(missing_by_row(summary)) + ".")
    for pair in summary.pairs:
        name = slug(pair.pair.title)
        parts += [f"## {pair.pair.title}", *_linked(f"reward_{name}", "Reward over updates and over compute", figures)]
        if pair.ratios:
            parts.append(ratio_table(pair, plan.seeds).markdown())
        parts += [
            geneval_table(pair).markdown(),
            *_linked(f"quality_{name}", "Noise-free reward and GenEval over updates", figures),
            *_linked(f"samples_{name}", "Samples of base model, Flow-GRPO and Stepwise", figures),
        ]
    if "gains" in figures:
        parts += ["## Where the reward is decided", *_linked("gains", "Mean absolute gain of every step", figures)]
    for one in summary.ablations:
        parts += [
            f"## {one.ablation.title}",
            f"{one.ablation.question} **{answer(one)}**",
            *_linked(f"ablation_{slug(one.ablation.title)}", one.ablation.question, figures),
            ablation_table(one).markdown(),
        ]
    parts += ["## What an update costs", *_linked("cost", "Seconds of an update by phase", figures)]
    parts += [cost_table(summary).markdown(), "## How it was measured"]
    parts.append("\n".join(f"- {name}: {text}" for name, text in facts_of(summary).items()))
    parts.append(f"`{COMMAND}` makes this page.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def curves(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Lists one record for every evaluation of every run: which run, its training reward by name, and the metrics."""
    records = []
    for row in rows_of(plan):
        runs = runs_of_row(results, row, plan.seeds)
        pace = seconds_per_update(runs)
        records += [record for run in runs for record in _records(run, pace)]
    return records


def inlined(svg: str, name: str) -> str:
    """Makes an SVG file fit to stand in a page: as wide as its place, with identifiers that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    return f'{head} role="img" aria-label="{name.replace("_", " ")}">{body}'


def keys_of(pair: PairSummary) -> list[Key]:
    """Lists the numbers of a pair that stand in large print."""
    keys = []
    for unit, words, target in (
        ("updates", "of Flow-GRPO's updates to its final reward", UPDATES_TARGET),
        ("seconds", "of its compute time", SECONDS_TARGET),
    ):
        one = next((one for one in pair.ratios if (one.sampler, one.unit) == ("noisy", unit)), None)
        if one is not None:
            keys.append(
                Key(number=ratio(one.median), words=words, target=f"target {target:.2f}", mark=mark(one.is_met))
            )
    if "overall" in pair.geneval:
        overall = pair.geneval["overall"]
        keys.append(Key(number=difference_of(overall).split(" ")[0], words="final GenEval", target=judged(overall)))
    if pair.cost == pair.cost:
        keys.append(Key(number=f"{TIMES}{pair.cost:.2f}", words="seconds of an update"))
    return keys


def missing_by_row(summary: Summary) -> list[str]:
    """Says for every row which seeds are missing, and why."""
    rows: dict[tuple[str, str], list[int]] = {}
    for (row, seed), reason in summary.missing.items():
        rows.setdefault((row, reason), []).append(seed)
    return [
        f"{row}, {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}: {reason}"
        for (row, reason), seeds in rows.items()
    ]


def facts_of(summary: Summary) -> dict[str, str]:
    """Says how the numbers came about."""
    rows = rows_of(summary.plan)
    runs = [run for run in summary.results.runs.values() if run.row in rows]
    pair_runs = [run for pair in summary.pairs for run in (*pair.flow_grpo, *pair.stepwise)]
    facts = {
        "The measure": (
            "For every seed, the first update at which Stepwise reaches the reward of Flow-GRPO's last evaluation, "
            "over the first at which Flow-GRPO itself does, interpolated between evaluations, both curves first made "
            "rising by isotonic regression, since a first crossing of a noisy curve rewards noise. It is read on the "
            "training sampler with fixed prompts; the median over seeds counts a seed that never arrives as infinite. "
            f"Targets: {UPDATES_TARGET:.2f} of the updates, {SECONDS_TARGET:.2f} of the compute seconds."
        ),
        "Compute seconds": (
            "Updates times the row's median seconds of an update, over updates and seeds, evaluation left out. "
            f"Targets for the cost of an update: {COST_TARGET:.1f} with {COST_TARGET_SUBSTEPS} substeps, "
            f"{CHEAPEST_COST_TARGET:.1f} for the cheapest row."
        ),
        "Spread": (
            "Means and sample standard deviations over seeds; bands are one standard deviation. A difference is "
            "beyond the spread when the 95 % interval of the paired differences (Student's t) leaves 0 out. "
            "With few seeds that is a strict rule."
        ),
        "Thin lines": f"Mean reward of the images trained on, running mean of {WINDOW} updates; their prompts differ.",
        "Seeds": listed(summary.plan.seeds),
    }
    if runs:
        facts |= {
            "Updates": _all_of(run.num_updates for run in runs),
            "Images of an update": _all_of(run.images_per_update for run in runs),
            "Sampler of the pairs": _all_of(f"{run.sampler}, {run.num_steps} steps" for run in pair_runs or runs),
            "Evaluation": _evaluation_of(runs),
            "Error of one evaluation": _error_of(pair_runs),
            "Versions": _versions_of(runs),
        }
    return {name: text for name, text in facts.items() if text}


def _evaluation_of(runs: Iterable[Run]) -> str:
    sets = set()
    for run in runs:
        prompts = [int(value) for name, value in run.params.items() if name.startswith("prompts.num_evaluation.")]
        images, steps = run.params.get("evaluation.images_per_prompt"), run.params.get("evaluation.num_steps")
        if images is not None and steps is not None:
            asked = f"{counted(sum(prompts), 'prompt')}, " if prompts else ""
            sets.add(f"{asked}{images} images each, {steps} noise-free steps")
    return f"{'; '.join(sorted(sets))}. Prompts and noise are the same for all rows." if sets else ""


def _error_of(runs: Iterable[Run]) -> str:
    finals = final_values(runs, "geneval/overall_stderr").values()
    if not finals:
        return ""
    return f"{statistics.median(finals):.3f} in GenEval overall, clustered by prompt: the median over the pairs' runs."


def _versions_of(runs: Iterable[Run]) -> str:
    known = {f"{name} {version}" for run in runs for name, version in run.versions.items()}
    if known:
        return ", ".join(sorted(known))
    installed = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, {', '.join(installed)} (where this report was written)"


def _all_of(values: Iterable[object]) -> str:
    return listed(dict.fromkeys(values))


def _linked(name: str, words: str, figures: Collection[str]) -> list[str]:
    return [f"![{words}]({IMAGES}/{name}.svg)"] if name in figures else []


def _records(run: Run, pace: float) -> Iterable[dict[str, Any]]:
    rewards = running_mean([entry.get("reward/mean", float("nan")) for entry in run.history])
    for entry in run.evaluations:
        update = int(entry["update"])
        record: dict[str, Any] = {
            "row": run.row,
            "seed": run.seed,
            "method": run.method,
            "label": run.label,
            "reward": run.reward,
            "update": update,
            "seconds": update * pace,
        }
        if 0 < update <= len(rewards):
            record["reward/running_mean"] = float(rewards[update - 1])
        yield record | dict(entry)
