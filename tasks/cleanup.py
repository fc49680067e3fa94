"""Removal of old worktrees and branches of runs, and of unreferenced data of DVC."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.exceptions import ObjectNotFound

from sfgrpo.runtime.locks import exclusive_lock
from tasks.git import git, remove_worktree
from tasks.stages import run_command, stage_task
from tasks.worktree import BRANCHES, RUNS_LOCK, WORKTREES, dvc_cache, run_of_branch

DAY_S = 24 * 3600.0


@stage_task("worktrees")
def remove_stale_worktrees(checkout: Path, days: float) -> dict[str, int]:
    """Remove the worktrees of runs that ended so many days ago; return their names and sizes in bytes.

    A worktree whose run is unknown to the server counts by its own age.
    """
    removed: dict[str, int] = {}
    for folder in sorted(path for path in (checkout / WORKTREES).glob("*-*") if path.is_dir()):
        if _ended_s_ago(folder) >= days * DAY_S:
            removed[folder.name] = size_of(folder)
            remove_worktree(checkout, folder)
    return removed


@stage_task("branches")
def remove_old_branches(checkout: Path, days: float, in_use: Collection[str]) -> list[str]:
    """Remove the branches that runs committed so many days ago, except those in use; return their names."""
    form = "--format=%(refname:short) %(committerdate:unix)"
    listed = git(checkout, "for-each-ref", form, f"refs/heads/{BRANCHES}").splitlines()
    removed: list[str] = []
    for branch, committed in (line.rsplit(" ", 1) for line in listed):
        is_old = time.time() - int(committed) >= days * DAY_S
        # A branch without the trailer of a run belongs to a person, and stays.
        if is_old and branch not in in_use and run_of_branch(checkout, branch) is not None:
            git(checkout, "update-ref", "-d", f"refs/heads/{branch}")
            removed.append(branch)
    return removed


@stage_task("dvc gc")
def collect_garbage(checkout: Path, rehearsal: bool, remote: bool) -> int | None:
    """Remove data of DVC to which no checkout, branch, tag or worktree refers; return the bytes freed in the cache.

    Return None while a run is at work, since nothing refers to its data yet.
    """
    with exclusive_lock(checkout / RUNS_LOCK) as no_run_at_work:
        if not no_run_at_work:
            return None
        # Worktrees of runs that will be started again.
        waiting = [str(path.parent) for path in sorted((checkout / WORKTREES).glob("*/dvc.lock"))]
        options = ["--workspace", "--all-branches", "--all-tags", *(["--projects", *waiting] if waiting else [])]
        options += ["--cloud"] if remote else []
        options += ["--dry"] if rehearsal else []
        cache = Path(dvc_cache(checkout))
        before = size_of(cache)
        run_command("gc", [sys.executable, "-m", "dvc", "gc", "--force", *options])
        return before - size_of(cache)


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _ended_s_ago(folder: Path) -> float:
    """Return how long ago the run of a worktree ended; negative while it may still go on."""
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
