"""Worktrees and commits by git's plumbing commands, which change no checkout and need no user settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

NAME = "sfgrpo"
EMAIL = "sfgrpo@localhost"


class GitError(RuntimeError):
    """git failed; the message ends with git's own."""


def git(folder: Path, *arguments: str, content: str | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run git in a folder, with `content` as its input; return its output without the line end. Hooks do not run."""
    # The caller may be a hook or an alias of git, whose variables name another repository.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    answer = subprocess.run(
        ["git", "-c", "core.hooksPath=/dev/null", *arguments],
        cwd=folder,
        env={**inherited, **(variables or {})},
        input=content,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise GitError(f"git {arguments[0]} failed in {folder}: {answer.stderr.strip()}")
    return answer.stdout.rstrip("\n")


def add_worktree(checkout: Path, folder: Path, commit: str) -> None:
    """Make a worktree at a commit, on no branch; replace an earlier one."""
    remove_worktree(checkout, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Twice: the second one overrides the lock of a worktree whose creation was interrupted.
    git(checkout, "worktree", "add", "--quiet", "--force", "--force", "--detach", str(folder), commit)


def remove_worktree(checkout: Path, folder: Path) -> None:
    """Remove a worktree and its files; one that is incomplete or missing is no error."""
    if folder.exists():
        shutil.rmtree(folder)
    git(checkout, "worktree", "prune")


def commit_files(folder: Path, parent: str, files: Mapping[str, str], message: str, *, same_time: bool = False) -> str:
    """Make a commit that is its parent with some text files replaced; return its id. No branch moves.

    With `same_time` it has the time of its parent, so that the same files and message always give the same commit.
    """
    time = git(folder, "show", "--no-patch", "--format=%ct +0000", parent) if same_time else None
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in _identity(time).items()}
    with tempfile.TemporaryDirectory() as temporary:
        variables = {**who, "GIT_INDEX_FILE": str(Path(temporary, "index"))}
        git(folder, "read-tree", parent, variables=variables)
        for name, content in files.items():
            blob = git(folder, "hash-object", "-w", "--stdin", content=content)
            git(folder, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", variables=variables)
        tree = git(folder, "write-tree", variables=variables)
        return git(folder, "commit-tree", tree, "-p", parent, "-F", "-", content=message, variables=variables)


def _identity(time: str | None) -> dict[str, str]:
    return {"NAME": NAME, "EMAIL": EMAIL} | ({} if time is None else {"DATE": time})
