"""Trains a policy, compares it with its base model and registers it: `python -m flows.train_policy`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable
from pydantic import Field

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.shutdown import sigterm_as_exit
from tasks.evaluations import evaluations_reported
from tasks.gpu_slots import gpu_slots
from tasks.promotion import promote_version
from tasks.stages import StageError, evaluate, prompts, push, refuse_inside_stage, register, train
from tasks.worktree import Workspace, is_deployed, own_workspace, save_branch

TABLE = Path("reports/evaluate/table.md")
SAMPLES = Path("reports/evaluate/samples.png")
STAGES = ("prompts", "train", "evaluate")
EDITION_VARIABLE = "prompts_edition"
EDITION_PARAMETER = "prompts.edition"

Changes = Annotated[dict[str, Any], Field(examples=[{"update.num_updates": 120, "seed": 1}])]
Edition = Annotated[int, Field(ge=0, le=2**31 - 1)]


@flow(name="train-policy")
def train_policy(
    changes: Changes | None = None, prompts_edition: Edition | None = None, promote: bool = True
) -> dict[str, Any]:
    """Runs the pipeline from prompts to model version; returns name, number and alias of the version.

    Args:
        changes: Values that this run shall have instead of those in params.yaml, by dotted name.
        prompts_edition: Drawing of the training prompts; empty takes the one that the last refresh made.
        promote: Whether the version is judged against the champion, and takes its place if it is better.
    """
    refuse_inside_stage()
    with own_workspace(_all_changes(changes or {}, prompts_edition)) as workspace:
        prompts()
        with slots_of(workspace):
            with evaluations_reported():
                train()
            evaluate()
        branch = None if workspace is None else keep(workspace, STAGES)
        version: dict[str, Any] = register(branch)
        create_markdown_artifact(
            report(version, branch), key="geneval", description="GenEval before and after training"
        )
        if promote:
            with slots_of(workspace):
                promote_version(version["name"], version["version"])
    return version


def slots_of(workspace: Workspace | None) -> contextlib.AbstractContextManager[None]:
    """Holds the GPUs of a run that a deployment started; who works in place sees to that alone."""
    return contextlib.nullcontext() if workspace is None else gpu_slots()


def _all_changes(changes: dict[str, Any], edition: int | None) -> dict[str, Any]:
    """Adds the edition of the prompts to the changes: the one asked for or, in a deployment, the current one."""
    if edition is None and is_deployed() and EDITION_PARAMETER not in changes:
        edition = current_edition()
    return changes if edition is None else {**changes, EDITION_PARAMETER: edition}


def current_edition() -> int | None:
    """Reads which edition of the prompts the last refresh made; None before the first one.

    Raises:
        ConfigError: somebody set the variable to something else than a number.
    """
    value = Variable.get(EDITION_VARIABLE)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(
            f"Prefect variable {EDITION_VARIABLE}: {value!r} is no edition; set it to 0 or more, or delete it"
        )
    return value


def keep(workspace: Workspace, stages: tuple[str, ...]) -> str:
    """Pushes what the stages made, if there is a remote, and commits `dvc.lock` to a branch; returns the branch."""
    if workspace.dvc_remote is None:
        get_run_logger().info("SFGRPO_DVC_REMOTE is not set: what DVC keeps stays on this machine")
    else:
        push(stages)
    branch = save_branch(workspace)
    get_run_logger().info("dvc.lock is on branch %s", branch)
    return branch


def report(version: dict[str, Any], branch: str | None = None) -> str:
    """Words the outcome in Markdown."""
    place = str(SAMPLES) if branch is None else f"{SAMPLES} on branch {branch}, after `dvc checkout`"
    return (
        f"{TABLE.read_text(encoding='utf-8').strip()}\n\n"
        f"Samples before and after: {place}\n\n"
        f"model version {version['version']} registered: {version['name']}@{version['alias']}"
    )


def main() -> int:
    """Runs the flow; prints the outcome, or the failed stage's own last lines, and returns the exit status."""
    try:
        # Prefect passes the signal on once the flow has ended; as an exit it also ends the temporary server.
        with sigterm_as_exit():
            version = train_policy(promote=False)
    except (StageError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{report(version)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
