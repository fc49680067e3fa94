"""Draw a new edition of the training prompts, and make it the one that the next training takes."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable
from pydantic import Field

from flows.train_policy import EDITION_PARAMETER, EDITION_VARIABLE, Edition, current_edition, keep
from sfgrpo.errors import ConfigError
from tasks.prompt_sets import PromptSets, read_prompt_sets
from tasks.stages import prompts, refuse_inside_stage
from tasks.worktree import run_worktree

NUM_EXAMPLES = 10


@flow(name="refresh-prompts")
def refresh_prompts(
    edition: Edition | None = None, num_examples: Annotated[int, Field(ge=0, le=100)] = NUM_EXAMPLES
) -> int:
    """Make an edition of the training prompts the current one; return its number. The others stay.

    Args:
        edition: The edition to draw; empty takes the one after the current one.
        num_examples: Prompts that are shown on the page of the run.
    """
    refuse_inside_stage()
    chosen = (current_edition() or 0) + 1 if edition is None else edition
    with run_worktree({EDITION_PARAMETER: chosen}) as worktree:
        if worktree is None:
            raise ConfigError("prompts are refreshed by a deployment only; run refresh-prompts/monthly")
        prompts()
        sets = read_prompt_sets()
        branch = keep(worktree, ("prompts",))
    # Last, so that the variable never names an edition that is not on a branch.
    Variable.set(EDITION_VARIABLE, chosen, overwrite=True)
    create_markdown_artifact(
        report(chosen, branch, sets, num_examples), key="prompts", description=f"Edition {chosen} of the prompts"
    )
    return chosen


def report(edition: int, branch: str, sets: PromptSets, num_examples: int) -> str:
    """Return the edition as Markdown: counts by task, and examples."""
    lines = [f"Edition {edition}, on branch {branch}.", "", "| Task | Training | Different | Validation | Evaluation |"]
    lines.append("|---|---:|---:|---:|---:|")
    lines += [
        f"| {count.tag} | {count.training} | {count.unique} | {count.validation} | {count.evaluation} |"
        for count in sets.counts
    ]
    lines += ["", "Examples:", "", *(f"- {text}" for text in sets.training_texts[:num_examples])]
    return "\n".join(lines)
