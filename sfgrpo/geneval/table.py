"""GenEval's table: the share of correct images of every task and their unweighted mean, with standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sfgrpo.types import TAGS, Tag

COLUMNS: dict[Tag, str] = {
    "single_object": "Single",
    "two_object": "Two",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Attr",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of correct images with its two standard errors."""

    mean: float
    stderr: float
    """Clustered by prompt, whose images are not independent: the error to report."""
    stderr_binomial: float
    """As if all images were independent."""

    def __str__(self) -> str:
        return f"{self.mean:.2f} \N{PLUS-MINUS SIGN} {self.stderr:.2f}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenEvalTable:
    """One row of a GenEval table: every task, and what GenEval's summary script prints below them."""

    tasks: Mapping[Tag, Share]
    """Tasks that were evaluated, in GenEval's order."""
    overall: Share
    """Unweighted mean of the tasks: an image of a large task weighs less than one of a small task."""
    correct_images: float
    """Share of all images pooled."""
    correct_prompts: float
    """Share of prompts with at least one correct image."""
    num_prompts: int
    num_images: int

    def to_dict(self) -> dict[str, float]:
        """Return the table as metrics "geneval/overall", "geneval/overall_stderr", "geneval/position", ..."""
        metrics: dict[str, float] = {}
        named: list[tuple[str, Share]] = [("overall", self.overall), *self.tasks.items()]
        for name, share in named:
            metrics[f"geneval/{name}"] = share.mean
            metrics[f"geneval/{name}_stderr"] = share.stderr
            metrics[f"geneval/{name}_stderr_binomial"] = share.stderr_binomial
        totals = ("correct_images", "correct_prompts", "num_prompts", "num_images")
        return metrics | {f"geneval/{name}": float(getattr(self, name)) for name in totals}


def summarise(tags: Sequence[Tag], correct_PG: NDArray[np.bool_]) -> GenEvalTable:
    """Summarise which images are correct: a row of `correct_PG` [prompts, images per prompt] for every tag of `tags`.

    A task's clustered standard error is std(prompt means) / sqrt(prompts), with the sample standard deviation; for one
    prompt it is the binomial error of a single image, as if its images were copies. Tasks are independent, so the
    overall error is sqrt(sum of squares) / tasks.

    Raises:
        ValueError: no images, or not one row for every tag.
    """
    correct_PG = np.asarray(correct_PG, dtype=bool)
    if correct_PG.ndim != 2 or len(correct_PG) != len(tags) or correct_PG.size == 0:
        raise ValueError(
            f"correct_PG has shape {list(correct_PG.shape)} for {len(tags)} prompts; "
            "give a non-empty array [prompts, images per prompt]"
        )
    of_tag = np.asarray(tags)
    tasks = {tag: _share(correct_PG[of_tag == tag]) for tag in TAGS if tag in tags}
    return GenEvalTable(
        tasks=tasks,
        overall=Share(
            mean=sum(share.mean for share in tasks.values()) / len(tasks),
            stderr=math.hypot(*(share.stderr for share in tasks.values())) / len(tasks),
            stderr_binomial=math.hypot(*(share.stderr_binomial for share in tasks.values())) / len(tasks),
        ),
        correct_images=float(correct_PG.mean()),
        correct_prompts=float(correct_PG.any(axis=1).mean()),
        num_prompts=len(correct_PG),
        num_images=correct_PG.size,
    )


def _share(correct_PG: NDArray[np.bool_]) -> Share:
    num_prompts = len(correct_PG)
    mean = float(correct_PG.mean())
    spread = float(correct_PG.mean(axis=1).std(ddof=1)) if num_prompts > 1 else math.sqrt(mean * (1.0 - mean))
    return Share(
        mean=mean,
        stderr=spread / math.sqrt(num_prompts),
        stderr_binomial=math.sqrt(mean * (1.0 - mean) / correct_PG.size),
    )


def markdown_table(rows: Mapping[str, GenEvalTable]) -> str:
    """Format tables as Markdown: overall, then the six tasks, as in the paper; a dash for tasks not evaluated."""
    lines = [["Model", "Overall", *COLUMNS.values()], ["---"] + ["---:"] * (1 + len(COLUMNS))]
    for name, table in rows.items():
        cells = [str(table.tasks[tag]) if tag in table.tasks else "-" for tag in COLUMNS]
        lines.append([name, str(table.overall), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
