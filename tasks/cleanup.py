"""Worktrees, branches and data of DVC that nobody needs any more."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.exceptions import ObjectNotFound

from tasks.git import git, remove_worktree
from tasks.stages import run_command, stage_task
from tasks.worktree import BRANCHES, WORKTREES, alone, dvc_cache, run_of_branch

DAY_S = 24 * 3600.0


@stage_task("worktrees")
def remove_stale_worktrees(checkout: Path, days: float) -> dict[str, int]:
    """Removes the worktrees of runs that ended so many days ago; returns their names and sizes in bytes.

    One of whose run the server knows nothing is judged by its own age.
    """
    removed: dict[str, int] = {}
    for folder in sorted(path for path in (checkout / WORKTREES).glob("*-*") if path.is_dir()):
        if _ended_s_ago(folder) >= days * DAY_S:
            removed[folder.name] = size_of(folder)
            remove_worktree(checkout, folder)
    return removed


@stage_task("branches")
def remove_old_branches(checkout: Path, days: float, in_use: Collection[str]) -> list[str]:
    """Removes the branches that runs committed so many days ago, but for those in use; returns their names."""
    form = "--format=%(refname:short) %(committerdate:unix)"
    listed = git(checkout, "for-each-ref", form, f"refs/heads/{BRANCHES}").splitlines()
    removed: list[str] = []
    for branch, committed in (line.rsplit(" ", 1) for line in listed):
        old = time.time() - int(committed) >= days * DAY_S
        # A branch that a person has put there, or is at work on, is none of ours.
        if old and branch not in in_use and run_of_branch(checkout, branch) is not None:
            git(checkout, "update-ref", "-d", f"refs/heads/{branch}")
            removed.append(branch)
    return removed


@stage_task("dvc gc")
def collect_garbage(checkout: Path, rehearsal: bool, remote: bool) -> int | None:
    """Removes data of DVC that neither the checkout, nor a branch, nor a tag, nor a run in a worktree refers to.

    Returns the bytes by which the cache got smaller; None when a run is at work, whose data nothing refers to yet.
    """
    with alone(checkout) as nobody_works:
        if not nobody_works:
            return None
        # Runs that wait to be started again.
        waiting = [str(path.parent) for path in sorted((checkout / WORKTREES).glob("*/dvc.lock"))]
        options = ["--workspace", "--all-branches", "--all-tags", *(["--projects", *waiting] if waiting else [])]
        options += ["--cloud"] if remote else []
        options += ["--dry"] if rehearsal else []
        cache = Path(dvc_cache(checkout))
        before = size_of(cache)
        run_command("gc", [sys.executable, "-m", "dvc", "gc", "--force", *options])
        return before - size_of(cache)


def size_of(folder: Path) -> int:
    """Adds up the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _ended_s_ago(folder: Path) -> float:
    """Tells how long ago the run of a worktree ended; negative while it may still go on."""
    try:
        run_id = UUID(folder.name)
    except ValueError:
        return -1.0
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(run_id)
        except ObjectNotFound:
            return time.time() - folder.stat().st_mtime
    if run.state is None or not run.state.is_final() or run.end_time is None:
        return -1.0
    return time.time() - run.end_time.timestamp()
