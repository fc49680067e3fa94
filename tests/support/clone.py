"""A clone of the repository with small numbers, in which programs run as a user runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfgrpo.runtime.environment import Environment
from sfgrpo.types import TAGS
from tests.support.paths import ROOT
from tests.support.tiny_run import write_params

MODEL = "sfgrpo-shapes"
NUM_UPDATES = 4
SMALL: Mapping[str, Any] = {
    "prompts.num_train": 50,
    "prompts.num_validation": dict.fromkeys(TAGS, 1),
    "prompts.num_evaluation": dict.fromkeys(TAGS, 1),
    "sampling.num_steps": 4,
    "rollout.prompts_per_update": 4,
    "rollout.group_size": 8,
    "rollout.micro_batch_size": 32,
    "update.num_updates": NUM_UPDATES,
    "update.steps_per_update": 2,
    "update.trained_steps": None,
    "update.micro_batch_size": 16,
    "checkpoint.every_num_updates": 1,
    "evaluation.num_steps": 2,
    "evaluation.images_per_prompt": 1,
    "evaluation.every_num_updates": 2,
    "registry.model_name": MODEL,
    "registry.alias": "challenger",
}
TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A copy of the repository, with its own Git history, DVC cache, Prefect server and MLflow store."""

    folder: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start `python -m ...` in the clone, as a user's shell would, with further environment variables."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env=user_environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> str:
        """Run `python -m ...` in the clone; return what it prints, once it has succeeded."""
        return finished(self.start(*arguments, **variables))

    def shown_evaluations(self) -> list[str]:
        """List the tables of evaluations among the artifacts of its Prefect server, oldest first."""
        with contextlib.closing(sqlite3.connect(self.folder / ".prefect/prefect.db")) as database:
            rows = database.execute("SELECT data FROM artifact WHERE key = 'evaluations' ORDER BY created").fetchall()
        return [str(json.loads(data)) for (data,) in rows]


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a process and return what it printed; fail, leaving nothing behind, unless it succeeds."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        # Its supervisors end what it started.
        process.kill()
    assert process.returncode == 0, output
    return output


def user_environment() -> dict[str, str]:
    """Return the environment of a user who has activated the virtual environment."""
    ours = {str(field.validation_alias) for field in Environment.model_fields.values()}
    foreign = ("PREFECT_", "MLFLOW_", "DVC_", "PYTEST_", "PYTHONPATH", "OMP_NUM_THREADS", "GIT_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign) and key not in ours}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # One thread: on a busy machine several of them mostly wait for one another.
    return inherited | {"PATH": path, "SFGRPO_DEVICE": "cpu", "SFGRPO_NUM_THREADS": "1"}


def build_clone(folder: Path, params: Mapping[str, Any] = SMALL) -> Clone:
    """Copy what Git has or would add, make the numbers small, and commit everything."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    write_params(folder, params)
    subprocess.run(["git", "init"], cwd=folder, capture_output=True, check=True)
    commit_all(folder)
    return Clone(folder=folder)


def commit_all(folder: Path) -> None:
    """Commit everything in a clone that Git does not ignore."""
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["add", "--all"], [*identity, "commit", "--message", "Clone"]):
        subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
