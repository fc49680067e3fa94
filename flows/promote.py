"""Decides whether a candidate of the registry becomes champion: `python -m flows.promote`."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow, get_run_logger
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.shutdown import sigterm_as_exit
from tasks.promotion import apply, judge, show_decision
from tasks.stages import StageError, prompts, refuse_inside_stage
from tasks.worktree import own_workspace

APPROVAL_S = 7 * 24 * 3600
"""How long a decision waits for a person."""
POLL_S = 5


class Approval(RunInput):
    """What a person says to a candidate that has passed every gate."""

    approve: bool = Field(description="Whether the candidate becomes champion")
    reason: str = Field(default="", description="Why; it is kept in the logs of the run")


@flow(name="promote")
def promote(model: str | None = None, version: int | None = None, approval: bool = False) -> dict[str, Any]:
    """Compares a candidate with the champion on the same prompts and noise, and moves the aliases if it is better.

    The new champion has to draw by its alias; if it cannot, the former one is champion again and the run fails.

    Args:
        model: Registered model; empty is that of params.yaml.
        version: Number of the candidate; empty is the version with the alias of params.yaml.
        approval: Whether a person has to agree, in the UI, before a candidate that passed becomes champion.
    """
    refuse_inside_stage()
    with own_workspace({}):
        prompts()
        judgement = judge(model, version)
    show_decision(judgement)
    # The decision is looked up by its run: what the folder holds may be of another one by the time that it is approved.
    if judgement["promoted"] and (not approval or approved(judgement)):
        apply(judgement["run_id"])
    return judgement


def approved(judgement: dict[str, Any]) -> bool:
    """Pauses the run until a person has answered, and returns the answer."""
    question = Approval.with_initial_data(description=judgement["report"])
    answer = pause_flow_run(wait_for_input=question, timeout=APPROVAL_S, poll_interval=POLL_S)
    word = "approved" if answer.approve else "refused"
    get_run_logger().info(
        "version %s of %s is %s: %s", judgement["version"], judgement["model"], word, answer.reason or "no reason given"
    )
    return answer.approve


def main() -> int:
    """Runs the flow; prints the report, or the failed command's own last lines, and returns the exit status."""
    try:
        with sigterm_as_exit():
            judgement = promote()
    except (StageError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{judgement['report']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
