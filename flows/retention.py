"""Remove the state, worktrees and branches of old runs, and report what was removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from sfgrpo.preflight.checkout import find_checkout
from tasks.cleanup import collect_garbage, remove_old_branches, remove_stale_worktrees
from tasks.maintenance import remove_finished
from tasks.stages import refuse_inside_stage

Days = Annotated[float, Field(ge=0, le=3650)]


@flow(name="retention")
def retention(
    state_days: Days = 14,
    worktree_days: Days = 3,
    branch_days: Days = 180,
    rehearse_state: bool = False,
    rehearse_data: bool = True,
    remote: bool = False,
) -> None:
    """Remove resumable state, its copies in the bucket, worktrees, branches and, on request, data of DVC.

    Args:
        state_days: Days after which a finished training's checkpoints are removed from the disk and the bucket.
        worktree_days: Days after which the worktree of a failed or cancelled run is removed.
        branch_days: Days after which the branch of a run is removed, unless an alias of the registry needs it.
        rehearse_state: Only list the checkpoints that would be removed.
        rehearse_data: Only list the data of DVC that no branch, tag or worktree refers to; switch off to remove it.
        remote: Look at the remote of DVC as well as at the cache.
    """
    refuse_inside_stage()
    checkout = find_checkout(Path.cwd())
    worktrees = remove_stale_worktrees(checkout, worktree_days)
    states = remove_finished(state_days, rehearse_state)
    branches = remove_old_branches(checkout, branch_days, states["branches"])
    num_bytes = collect_garbage(checkout, rehearse_data, remote)
    create_markdown_artifact(
        report(worktrees, states, branches, num_bytes, rehearse_state, rehearse_data),
        key="retention",
        description="What was removed",
    )


def report(
    worktrees: Mapping[str, int],
    states: Mapping[str, Any],
    branches: Sequence[str],
    num_bytes: int | None,
    rehearse_state: bool,
    rehearse_data: bool,
) -> str:
    """Return what was removed as Markdown."""
    state = "would be removed" if rehearse_state else "removed"
    lines = ["| What | Where | MB | |", "|---|---|---:|---|"]
    lines += [f"| worktree | {name} | {size / 1e6:.1f} | removed |" for name, size in worktrees.items()]
    lines += [
        f"| state of {each['name']} | {each['place']} | {each['num_bytes'] / 1e6:.1f} | {state} |"
        for each in states["removed"]
    ]
    lines += [f"| branch | {name} | | removed |" for name in branches]
    if num_bytes is None:
        lines.append("| data of DVC | cache | | left alone: a run is at work |")
    elif rehearse_data:
        lines.append("| data of DVC | cache | | only listed, in the log of the task `dvc gc` |")
    else:
        lines.append(f"| data of DVC | cache | {num_bytes / 1e6:.1f} | removed |")
    kept = ", ".join(states["kept"]) or "none"
    return "\n".join([*lines, "", f"Runs whose state is kept, since they finished too recently or not at all: {kept}"])
