"""Train a policy, compare it with its base model and register it: `python -m flows.train_policy`."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable
from pydantic import Field

from sfgrpo.config.stages import EvaluateStage, PromptsStage, RegisterStage, TrainStage
from sfgrpo.errors import ConfigError
from sfgrpo.paths import EVALUATE_REPORT
from tasks.evaluations import background_evaluations
from tasks.gpu_slots import gpu_slots
from tasks.program import flow_as_program
from tasks.promotion import promote_version
from tasks.stages import evaluate, prompts, push, refuse_inside_stage, register, train
from tasks.worktree import Worktree, is_deployed, run_worktree, save_branch

STAGES = ("prompts", "train", "evaluate")
EDITION_VARIABLE = "prompts_edition"
EDITION_PARAMETER = "prompts.edition"

Changes = Annotated[dict[str, Any], Field(examples=[{"update.num_updates": 120, "seed": 1}])]
Edition = Annotated[int, Field(ge=0, le=2**31 - 1)]


@flow(name="train-policy")
def train_policy(
    changes: Changes | None = None, prompts_edition: Edition | None = None, promote: bool = True
) -> dict[str, Any]:
    """Run the pipeline from prompts to model version; return name, number and alias of the version.

    Args:
        changes: Values that override those of params.yaml in this run, by dotted name.
        prompts_edition: Edition of the training prompts; empty takes the one that the last refresh made.
        promote: Whether the version is compared with the champion, and takes its place if it is better.
    """
    refuse_inside_stage()
    with run_worktree(_all_changes(changes or {}, prompts_edition)) as worktree:
        prompts()
        with gpu_slots():
            with background_evaluations():
                train()
            evaluate()
        branch = None if worktree is None else keep(worktree, STAGES)
        version: dict[str, Any] = register(branch)
        create_markdown_artifact(
            report(version, branch), key="geneval", description="GenEval before and after training"
        )
        if promote:
            with gpu_slots():
                promote_version(version["name"], version["version"])
    return version


def _all_changes(changes: dict[str, Any], edition: int | None) -> dict[str, Any]:
    """Return the changes with the edition of the prompts: the given one or, in a deployment, the current one."""
    if edition is None and is_deployed() and EDITION_PARAMETER not in changes:
        edition = current_edition()
    return changes if edition is None else {**changes, EDITION_PARAMETER: edition}


def current_edition() -> int | None:
    """Return the edition of the prompts that the last refresh made; None before the first one.

    Raises:
        ConfigError: the Prefect variable is not an integer of 0 or more.
    """
    value = Variable.get(EDITION_VARIABLE)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(
            f"Prefect variable {EDITION_VARIABLE}: {value!r} is not an edition; set it to 0 or more, or delete it"
        )
    return value


def keep(worktree: Worktree, stages: tuple[str, ...]) -> str:
    """Push the outputs of the stages, if there is a remote, and commit `dvc.lock` to a branch; return the branch."""
    if worktree.dvc_remote is None:
        get_run_logger().info("SFGRPO_DVC_REMOTE is not set: the data of DVC stay on this machine")
    else:
        push(stages)
    branch = save_branch(worktree)
    get_run_logger().info("dvc.lock is on branch %s", branch)
    return branch


def report(version: dict[str, Any], branch: str | None = None) -> str:
    """Return the outcome as Markdown."""
    table = (EVALUATE_REPORT / "table.md").read_text(encoding="utf-8").strip()
    samples = EVALUATE_REPORT / "samples.png"
    place = str(samples) if branch is None else f"{samples} on branch {branch}, after `dvc checkout`"
    return (
        f"{table}\n\n"
        f"Samples before and after: {place}\n\n"
        f"model version {version['version']} registered: {version['name']}@{version['alias']}"
    )


def main() -> None:
    """Run the flow and print the outcome."""
    with flow_as_program((PromptsStage, TrainStage, EvaluateStage, RegisterStage)):
        version = train_policy(promote=False)
    print(f"\n{report(version)}\n")


if __name__ == "__main__":
    main()
