"""A git worktree for every run of a deployment, so that its changes and results stay apart until it succeeds.

The worktree is named by the flow run, so that a run that is started again finds it. It shares the checkout's DVC cache
and scratch folder: finished stages are not computed again, and the next run resumes a training that was killed. In
the checkout itself only the folder of the worktrees is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.context import FlowRunContext

from sfgrpo.config.addresses import sqlite_path
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.paths import PARAMS
from sfgrpo.preflight.checkout import find_checkout
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.locks import exclusive_lock, shared_lock
from tasks.git import GitError, add_worktree, commit_files, git, remove_worktree
from tasks.overrides import changed_parameters

WORKTREES = Path(".worktrees")
RUNS_LOCK = WORKTREES / ".lock"
"""Shared by all runs in worktrees; the removal of DVC's data takes it exclusively."""
DVC_SETTINGS = Path(".dvc/config.local")
"""Written last: a worktree without it is incomplete."""
DVC_LOCK = "dvc.lock"
BRANCHES = "runs/"
MAX_BRANCH_NAME = 100
REMOTE = "store"
RUN_TRAILER = "Prefect-Flow-Run"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Worktree:
    """The worktree of a run of a deployment."""

    checkout: Path
    """The checkout that the deployment was made from."""
    folder: Path
    run_id: str
    run_name: str
    commit: str
    """The checkout's commit, or one on top of it with the run's parameters."""
    dvc_remote: str | None
    """Address that DVC pushes to, if any."""


def is_deployed() -> bool:
    """Return whether a deployment started this flow run, and not a person the program."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


@contextlib.contextmanager
def run_worktree(changes: Mapping[str, Any]) -> Iterator[Worktree | None]:
    """Work in a worktree of this run, with some parameters changed, until the block ends.

    The worktree is removed when the block succeeds; otherwise it is kept for a retry or for inspection. Only runs of
    deployments have one, each in its own process. Any other run works in place and gets None.

    Raises:
        ConfigError: the parameters are wrong, or were given to a run that works in place; nothing was made.
    """
    if not is_deployed():
        if changes:
            raise ConfigError(
                f"parameters {', '.join(changes)} were given to a run that works in place; write them to {PARAMS}, or "
                "run a deployment"
            )
        yield None
        return
    checkout = find_checkout(Path.cwd())
    worktree = _planned(checkout, changes)
    with (
        shared_lock(checkout / RUNS_LOCK),
        # If the server takes a run for dead and starts it again, the second process waits for the first.
        exclusive_lock(worktree.folder.with_suffix(".lock"), math.inf),
    ):
        _make(worktree)
        get_run_logger().info("working in %s at commit %s", worktree.folder, worktree.commit[:10])
        with contextlib.chdir(worktree.folder), _variables(_environment(checkout)):
            yield worktree
        remove_worktree(checkout, worktree.folder)


def save_branch(worktree: Worktree) -> str:
    """Commit the `dvc.lock` of a run, on top of its parameters, to the run's branch; return the branch.

    Saving again moves the branch. If a person or another run of the same name has made a branch of that name, it stays
    as it is, and this run's branch has the id of the run in its name.
    """
    branch = BRANCHES + (branch_name(worktree.run_name) or worktree.run_id)
    taken = git(worktree.checkout, "for-each-ref", f"refs/heads/{branch}")
    if taken and run_of_branch(worktree.checkout, branch) != worktree.run_id:
        branch += f"-{worktree.run_id[:8]}"
    message = f"Run {' '.join(worktree.run_name.split())}\n\n{RUN_TRAILER}: {worktree.run_id}\n"
    lock = (worktree.folder / DVC_LOCK).read_text(encoding="utf-8")
    commit = commit_files(worktree.folder, worktree.commit, {DVC_LOCK: lock}, message)
    git(worktree.checkout, "update-ref", f"refs/heads/{branch}", commit)
    return branch


def branch_name(run_name: str) -> str:
    """Return the part of a run's name that may name a branch, which is a file of at most 255 bytes; empty if none."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", run_name)[:MAX_BRANCH_NAME].strip("-")


def run_of_branch(checkout: Path, branch: str) -> str | None:
    """Return the id of the flow run that made a branch; None if the branch is missing or no run made it."""
    form = f"--format=%(trailers:key={RUN_TRAILER},valueonly)"
    try:
        return git(checkout, "show", "--no-patch", form, f"refs/heads/{branch}").strip() or None
    except GitError:
        return None


def _planned(checkout: Path, changes: Mapping[str, Any]) -> Worktree:
    """Check everything that can be wrong; make nothing but a commit that is on no branch."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "only runs of deployments have a worktree"
    run = context.flow_run
    folder = checkout / WORKTREES / str(run.id)
    return Worktree(
        checkout=checkout,
        folder=folder,
        run_id=str(run.id),
        run_name=run.name,
        # A run that is started again keeps its first commit.
        commit=git(folder, "rev-parse", "HEAD") if _is_complete(folder) else _commit_with(checkout, changes),
        dvc_remote=read_environment().dvc_remote,
    )


def _commit_with(checkout: Path, changes: Mapping[str, Any]) -> str:
    """Return the checkout's commit, or one on top of it that depends on the parameters alone."""
    head = git(checkout, "rev-parse", "HEAD")
    shipped = git(checkout, "show", f"{head}:{PARAMS}")
    wanted = changed_parameters(shipped, changes)
    if wanted == shipped:
        return head
    listed = "".join(f"\n{name}: {json.dumps(value)}" for name, value in sorted(changes.items()))
    return commit_files(checkout, head, {PARAMS: wanted}, f"Parameters of a run\n{listed}\n", same_time=True)


def _make(worktree: Worktree) -> None:
    if _is_complete(worktree.folder):
        return
    add_worktree(worktree.checkout, worktree.folder, worktree.commit)
    atomic_write(worktree.folder / DVC_SETTINGS, _dvc_settings(worktree))


def _dvc_settings(worktree: Worktree) -> str:
    """Return DVC's settings of the worktree: the checkout's cache, and the remote."""
    settings = {"cache": {"dir": dvc_cache(worktree.checkout)}}
    if worktree.dvc_remote is not None:
        settings |= {"core": {"remote": REMOTE}, f"'remote \"{REMOTE}\"'": {"url": worktree.dvc_remote}}
        encryption = read_environment().s3_encryption
        if encryption is not None and worktree.dvc_remote.startswith("s3://"):
            kind, _, key = encryption.partition("aws:kms:")
            settings[f"'remote \"{REMOTE}\"'"] |= {"sse_kms_key_id": key, "sse": "aws:kms"} if key else {"sse": kind}
    return "".join(
        f"[{section}]\n" + "".join(f"    {name} = {value}\n" for name, value in values.items())
        for section, values in settings.items()
    )


def _is_complete(folder: Path) -> bool:
    return (folder / DVC_SETTINGS).exists()


def dvc_cache(checkout: Path) -> str:
    """Return the absolute path of DVC's cache."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    answer = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if answer.returncode:
        raise SfgrpoError(f"`dvc cache dir` failed in {checkout}: {answer.stderr.strip()}")
    return str((checkout / answer.stdout.strip()).resolve())


def _environment(checkout: Path) -> dict[str, str]:
    """Return variables that point from the worktree to the checkout's scratch folder and MLflow database."""
    environment = read_environment()
    variables = {"SFGRPO_SCRATCH": str(checkout / environment.scratch_dir)}
    if (database := sqlite_path(environment.tracking_uri)) is not None:
        variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{checkout / database}"
    return variables


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
