"""Whether the checkout and the installed packages are what the lock file and git say."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from sfgrpo.errors import ConfigError
from sfgrpo.preflight.report import Doubt

LOCK = Path("requirements.lock")
NUM_NAMED = 3
"""Packages that a message names before it says how many more there are."""


def find_checkout(folder: Path) -> Path:
    """Return the root of the git checkout that holds a folder.

    Raises:
        ConfigError: git is not installed or does not trust the folder, it is in no checkout, or nothing is committed.
    """
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except FileNotFoundError as error:
        raise ConfigError("git is not installed, and DVC and the flows need it; install the package git") from error
    for answer in (top, commit):
        if answer.returncode:
            raise ConfigError(_without_checkout(folder, answer.stderr.strip()))
    return Path(top.stdout.rstrip("\n"))


def check_checkout(folder: Path) -> str:
    """Return the commit of a checkout; doubt one with changes, since records name the commit alone."""
    top = find_checkout(folder)
    commit = _git(top, "rev-parse", "--short", "HEAD").stdout.strip()
    changed = _git(top, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock").stdout.splitlines()
    if changed:
        raise Doubt(
            f"commit {commit} with {len(changed)} changed files, which no record holds and no scheduled run sees; "
            "commit them"
        )
    return f"commit {commit}, nothing changed"


def check_packages(lock: Path = LOCK) -> str:
    """Compare the installed packages with the lock file; doubt others, on which no test has run.

    Raises:
        ConfigError: The virtual environment was moved, so that its programs start another one's Python.
    """
    _check_programs(Path(sys.prefix))
    if not lock.exists():
        raise Doubt(f"{lock} is not here, so the installed packages cannot be compared; work in the checkout")
    wanted = _locked(lock.read_text(encoding="utf-8"))
    other = []
    for name, version in wanted.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found.partition("+")[0] != version.partition("+")[0]:
            other.append(f"{name} {found} instead of {version}")
    if other:
        more = f" and {len(other) - NUM_NAMED} more" if len(other) > NUM_NAMED else ""
        raise Doubt(f"{', '.join(other[:NUM_NAMED])}{more}; run `touch {lock}; make setup`")
    return f"Python {sys.version.split()[0]} and the {len(wanted)} packages of {lock}"


def _locked(text: str) -> dict[str, str]:
    """Return the versions that a lock file has for this Python and system."""
    from packaging.requirements import Requirement

    lines = [line.rstrip("\\ ") for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    requirements = [Requirement(line.partition(" --hash")[0].partition(" #")[0]) for line in lines]
    here = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    return {each.name: next(iter(each.specifier)).version for each in here if each.specifier}


def _check_programs(prefix: Path) -> None:
    program = prefix / "bin" / "dvc"
    try:
        first = program.read_bytes().split(b"\n", 1)[0].decode(errors="replace")
    except OSError:
        return
    python = first.removeprefix("#!").strip()
    if first.startswith("#!/") and " " not in python and not os.path.exists(python):
        raise ConfigError(
            f"{prefix} was moved: its programs, such as {program.name}, want {python}; remove the folder, and run "
            "`make setup`"
        )


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The caller may be a hook or an alias of git, whose variables name another repository. Messages are in English, so
    # that they can be told apart.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}
    return subprocess.run(["git", *arguments], cwd=folder, env=variables, capture_output=True, text=True)


def _without_checkout(folder: Path, reason: str) -> str:
    """Return the error of a folder in which git fails, with its cure."""
    commit = f"`git -C {folder} add --all && git -C {folder} commit --message Import`"
    if "dubious ownership" in reason:
        return (
            f"{folder} belongs to another user, so git does not trust it; run "
            f"`git config --global --add safe.directory {folder}`, or work as its owner"
        )
    if "not a git repository: " in reason:
        return f"{folder} was a worktree or submodule whose repository is gone; get the project by `git clone`"
    if "not a git repository" in reason:
        return (
            f"{folder} is no git checkout, as after the download of a ZIP file, and DVC and the flows need one; "
            f"get the project by `git clone`, or run `git -C {folder} init` and {commit}"
        )
    if not reason:
        return f"the git repository of {folder} has no commit, and every version names one; run {commit}"
    return f"git fails in {folder} ({reason}); correct that first"
