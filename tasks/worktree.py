"""A git worktree for every run that a deployment starts: what it changes and makes is its own until it succeeds.

The worktree is named by the flow run, so that a run that is started again finds it. It shares the checkout's DVC cache
and scratch folder: what was computed before is not computed again, and a training that was killed with its run is
taken up by the next one. Nothing is written to the checkout itself but the folder of the worktrees.
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

from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.paths import PARAMS
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.locks import exclusive_lock, shared_lock
from sfgrpo.tracking.mlflow_client import sqlite_path
from tasks.git import GitError, add_worktree, commit_files, git, remove_worktree, top_folder
from tasks.overrides import changed_parameters

WORKTREES = Path(".worktrees")
LOCK = WORKTREES / ".lock"
"""Held by every run while it works in a worktree; whoever removes data of DVC takes it alone."""
DVC_SETTINGS = Path(".dvc/config.local")
"""Written last: a worktree without it is not complete."""
DVC_LOCK = "dvc.lock"
BRANCHES = "runs/"
REMOTE = "store"
RUN_TRAILER = "Prefect-Flow-Run"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where a run of a deployment works, and what it works on."""

    checkout: Path
    """The checkout that the deployment was made from."""
    folder: Path
    run_id: str
    run_name: str
    commit: str
    """What the worktree was made of: the checkout's commit, with the run's parameters."""
    dvc_remote: str | None
    """Address that DVC pushes to; None when there is none."""


def is_deployed() -> bool:
    """Tells whether a deployment started this flow run, as against a person who started its program."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


@contextlib.contextmanager
def own_workspace(changes: Mapping[str, Any]) -> Iterator[Workspace | None]:
    """Makes a worktree the working directory of this process, with some parameters changed, until the block ends.

    It is removed when the block succeeds, and kept for another try, or a look, when it does not. Only runs of
    deployments have one, each in a process of its own; any other run works in place, and gets None.

    Raises:
        ConfigError: the parameters are wrong, or are given to a run that works in place; nothing was made.
    """
    if not is_deployed():
        if changes:
            raise ConfigError(
                f"parameters {', '.join(changes)} were given to a run that works in place; write them to {PARAMS}, or "
                "run a deployment"
            )
        yield None
        return
    checkout = top_folder(Path.cwd())
    workspace = _planned(checkout, changes)
    with (
        shared_lock(checkout / LOCK),
        # Should a server start a run a second time that it takes for dead, the second process waits for the first.
        exclusive_lock(workspace.folder.with_suffix(".lock"), math.inf),
    ):
        _make(workspace)
        get_run_logger().info("working in %s at commit %s", workspace.folder, workspace.commit[:10])
        with contextlib.chdir(workspace.folder), _variables(_environment(checkout)):
            yield workspace
        remove_worktree(checkout, workspace.folder)


def save_branch(workspace: Workspace) -> str:
    """Commits the `dvc.lock` of a run, on top of its parameters, to a branch of its own; returns the branch.

    Saved again, the branch moves. One that a person, or another run of the same name, has made is left alone: this
    run's then bears its id as well.
    """
    branch = BRANCHES + (re.sub(r"[^A-Za-z0-9_-]+", "-", workspace.run_name).strip("-") or workspace.run_id)
    taken = git(workspace.checkout, "for-each-ref", f"refs/heads/{branch}")
    if taken and run_of_branch(workspace.checkout, branch) != workspace.run_id:
        branch += f"-{workspace.run_id[:8]}"
    message = f"Run {workspace.run_name}\n\n{RUN_TRAILER}: {workspace.run_id}\n"
    lock = (workspace.folder / DVC_LOCK).read_text(encoding="utf-8")
    commit = commit_files(workspace.folder, workspace.commit, {DVC_LOCK: lock}, message)
    git(workspace.checkout, "update-ref", f"refs/heads/{branch}", commit)
    return branch


def run_of_branch(checkout: Path, branch: str) -> str | None:
    """Reads which flow run has made a branch; None when there is no such branch, or no run has made it."""
    form = f"--format=%(trailers:key={RUN_TRAILER},valueonly)"
    try:
        return git(checkout, "show", "--no-patch", form, f"refs/heads/{branch}").strip() or None
    except GitError:
        return None


@contextlib.contextmanager
def alone(checkout: Path) -> Iterator[bool]:
    """Keeps runs from starting within the block; tells whether it could, since none is at work in a worktree."""
    with exclusive_lock(checkout / LOCK) as taken:
        yield taken


def _planned(checkout: Path, changes: Mapping[str, Any]) -> Workspace:
    """Checks all that can be wrong, and makes nothing but a commit that no branch holds."""
    run = FlowRunContext.get().flow_run  # type: ignore[union-attr]
    assert run is not None
    folder = checkout / WORKTREES / str(run.id)
    return Workspace(
        checkout=checkout,
        folder=folder,
        run_id=str(run.id),
        run_name=run.name,
        # A run that is started again goes on with what it was started with.
        commit=git(folder, "rev-parse", "HEAD") if _is_complete(folder) else _commit_with(checkout, changes),
        dvc_remote=read_environment().dvc_remote,
    )


def _commit_with(checkout: Path, changes: Mapping[str, Any]) -> str:
    """Names the commit of the checkout, or makes one on top of it, always the same one for the same parameters."""
    head = git(checkout, "rev-parse", "HEAD")
    shipped = git(checkout, "show", f"{head}:{PARAMS}")
    wanted = changed_parameters(shipped, changes)
    if wanted == shipped:
        return head
    told = "".join(f"\n{name}: {json.dumps(value)}" for name, value in sorted(changes.items()))
    return commit_files(checkout, head, {PARAMS: wanted}, f"Parameters of a run\n{told}\n", same_time=True)


def _make(workspace: Workspace) -> None:
    if _is_complete(workspace.folder):
        return
    add_worktree(workspace.checkout, workspace.folder, workspace.commit)
    atomic_write(workspace.folder / DVC_SETTINGS, _dvc_settings(workspace))


def _dvc_settings(workspace: Workspace) -> str:
    """Words the settings of DVC that the worktree has for itself: the checkout's cache, and the remote."""
    settings = {"cache": {"dir": dvc_cache(workspace.checkout)}}
    if workspace.dvc_remote is not None:
        settings |= {"core": {"remote": REMOTE}, f"'remote \"{REMOTE}\"'": {"url": workspace.dvc_remote}}
        encryption = read_environment().s3_encryption
        if encryption is not None and workspace.dvc_remote.startswith("s3://"):
            kind, _, key = encryption.partition("aws:kms:")
            settings[f"'remote \"{REMOTE}\"'"] |= {"sse_kms_key_id": key, "sse": "aws:kms"} if key else {"sse": kind}
    return "".join(
        f"[{section}]\n" + "".join(f"    {name} = {value}\n" for name, value in values.items())
        for section, values in settings.items()
    )


def _is_complete(folder: Path) -> bool:
    return (folder / DVC_SETTINGS).exists()


def dvc_cache(checkout: Path) -> str:
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    answer = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if answer.returncode:
        raise SfgrpoError(f"`dvc cache dir` failed in {checkout}: {answer.stderr.strip()}")
    return str((checkout / answer.stdout.strip()).resolve())


def _environment(checkout: Path) -> dict[str, str]:
    """Gives the variables by which work in a worktree shares the checkout's state, where they name it relatively."""
    environment = read_environment()
    variables = {"SFGRPO_SCRATCH": str(checkout / environment.scratch_dir)}
    if (database := sqlite_path(environment.tracking_uri)) is not None:
        variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{checkout / database}"
    return variables


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within the block."""
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
