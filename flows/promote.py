"""Decide whether a candidate of the registry becomes champion: `python -m flows.promote`."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from sfgrpo.config.stages import PromoteStage, PromptsStage
from tasks.program import flow_as_program
from tasks.promotion import apply, decide, show_decision
from tasks.stages import prompts, refuse_inside_stage
from tasks.worktree import run_worktree

APPROVAL_S = 7 * 24 * 3600
"""How long a decision waits for a person."""
POLL_S = 5


class Approval(RunInput):
    """A person's answer to a candidate that has passed every gate."""

    approve: bool = Field(description="Whether the candidate becomes champion")
    reason: str = Field(default="", description="Why; kept in the log of the run")


@flow(name="promote")
def promote(model: str | None = None, version: int | None = None, approval: bool = False) -> dict[str, Any]:
    """Compare a candidate with the champion on the same prompts and noise; move the aliases if it is better.

    The candidate has to be what was registered, and to draw an image. Otherwise no alias moves and the run fails.

    Args:
        model: Registered model; empty takes that of params.yaml.
        version: Number of the candidate; empty takes the version with the alias of params.yaml.
        approval: Whether a person has to agree, in the UI, before a candidate that passed becomes champion.
    """
    refuse_inside_stage()
    with run_worktree({}):
        prompts()
        decision = decide(model, version)
    show_decision(decision)
    # By the time of an approval the folder may hold another decision, so it is looked up by its run.
    if decision["promoted"] and (not approval or approved(decision)):
        apply(decision["run_id"])
    return decision


def approved(decision: dict[str, Any]) -> bool:
    """Pause the run until a person has answered; return whether the candidate is approved."""
    question = Approval.with_initial_data(description=decision["report"])
    answer = pause_flow_run(wait_for_input=question, timeout=APPROVAL_S, poll_interval=POLL_S)
    word = "approved" if answer.approve else "refused"
    get_run_logger().info(
        "version %s of %s is %s: %s", decision["version"], decision["model"], word, answer.reason or "no reason given"
    )
    return answer.approve


if __name__ == "__main__":
    with flow_as_program((PromptsStage, PromoteStage)):
        print(f"\n{promote()['report']}")
