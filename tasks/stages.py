"""The stages of the pipeline as Prefect tasks: DVC decides whether a stage has to run, Prefect when and how often."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.tasks import Task

from sfgrpo.errors import ConfigError, ExitStatus
from sfgrpo.runtime.environment import read_environment
from tasks.progress import ShownProgress
from tasks.supervisor import is_stopping, run_supervised

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LOGS = Path("logs")
METRICS = Path("reports/evaluate/metrics.json")
REGISTRATION = Path("reports/registered.json")
"""Written by `python -m sfgrpo register`; no output of DVC, since the registry is the truth."""
DVC_ADVICE = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
"""How the lines start that DVC prints around every stage; `--quiet` would hide its errors as well."""
NUM_SHOWN_LINES = 20
RETRY_DELAY_S = 5


class StageError(RuntimeError):
    """A stage failed; the message ends with the last lines that it printed."""

    def __init__(self, stage: str, status: int, lines: Sequence[str]) -> None:
        super().__init__(stage, status, lines)
        self.stage = stage
        self.status = status
        self.lines = lines

    def __str__(self) -> str:
        shown = "\n".join(f"  {line}" for line in self.lines)
        return f"stage {self.stage} failed with exit status {self.status}; its last lines were\n{shown}"


def refuse_inside_stage() -> None:
    """Raises if DVC runs this process: the stages that the flow starts would wait for the one that started it."""
    if stage := os.environ.get("DVC_STAGE"):
        raise RuntimeError(f"DVC stage {stage} started the flow, which would wait for that stage; start it by itself")


def run_command(
    stage: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    *,
    over: threading.Event | None = None,
) -> None:
    """Runs a command under supervision, with further environment variables, and logs its output, but for DVC's advice.

    Every line that is logged goes to `on_line` as well. The command is ended once `over` is set.

    Raises:
        StageError: the command failed. The exit status is that of the stage when DVC reports one.
    """
    logger = get_run_logger()
    lines: deque[str] = deque(maxlen=NUM_SHOWN_LINES)

    def show(line: str) -> None:
        if not line.strip().startswith(DVC_ADVICE):
            lines.append(line)
            logger.info("%s", line)
            on_line(line)

    try:
        grace_s = read_environment().grace_s
    except ConfigError as error:
        raise StageError(stage, ExitStatus.WRONG_CONFIGURATION, str(error).splitlines()) from error
    # The stages are `python -m sfgrpo ...`: of all Pythons, they need this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    status = run_supervised(
        command,
        LOGS / f"{stage}.log",
        show,
        # Unbuffered, so that lines appear when they are printed, and errors after what led to them.
        {**os.environ, "PYTHONUNBUFFERED": "1", **_flow_variables(), **(environment or {}), "PATH": path},
        grace_s=grace_s,
        over=over,
    )
    if status:
        reported = re.findall(r"exited with (\d+)", "\n".join(lines))
        raise StageError(stage, int(reported[-1]) if reported else status, tuple(lines))


def reproduce(
    stage: str,
    file: str = "dvc.yaml",
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Brings one DVC stage up to date; stages may run side by side.

    A stage that was told to stop goes on, as often as it takes, until this process itself is told to stop.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", f"{file}:{stage}"]
    while True:
        try:
            return run_command(stage, command, environment, on_line)
        except StageError as error:
            if error.status != ExitStatus.RESUMABLE or is_stopping(within_s=RETRY_DELAY_S):
                raise
            get_run_logger().warning("stage %s was told to stop; it goes on from where it stopped", stage)


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Tells whether a failure may pass by itself: wrong parameters stay wrong, and who was told to stop stops."""
    error = state.result(raise_on_failure=False)
    return not is_stopping() and not (isinstance(error, StageError) and error.status == ExitStatus.WRONG_CONFIGURATION)


def stage_task(
    name: str, run_name: str | None = None
) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Gives the options that all tasks share; `run_name` may hold parameters of the task in braces."""
    return task(
        name=name,
        task_run_name=run_name or name,
        retries=2,
        retry_delay_seconds=RETRY_DELAY_S,
        retry_condition_fn=worth_retrying,
        cache_policy=NO_CACHE,
    )


@stage_task("prompts")
def prompts() -> None:
    """Writes the prompt sets."""
    reproduce("prompts")


@stage_task("train")
def train() -> None:
    """Trains the policy; a retry goes on from the last checkpoint, and so does a training that was told to stop."""
    reproduce("train", on_line=ShownProgress("training").show)


@stage_task("evaluate")
def evaluate() -> dict[str, Any]:
    """Compares the policy with the base model; returns the metrics."""
    reproduce("evaluate")
    return cast(dict[str, Any], json.loads(METRICS.read_text(encoding="utf-8")))


@stage_task("register")
def register(branch: str | None = None) -> dict[str, Any]:
    """Registers the policy; returns name, number and alias of the version, which names the branch of the run, if any.

    It is no DVC stage: DVC would skip it, or restore it from a cache, on a machine whose registry knows nothing of it.
    It is a process of its own so that the flow never holds a model, and is killed and retried like the other stages.
    """
    REGISTRATION.unlink(missing_ok=True)
    variables = {} if branch is None else {"SFGRPO_BRANCH": branch}
    run_command("register", [sys.executable, "-m", "sfgrpo", "register"], variables)
    return cast(dict[str, Any], json.loads(REGISTRATION.read_text(encoding="utf-8")))


@stage_task("push")
def push(stages: Sequence[str]) -> None:
    """Copies the outputs of some stages to the remote of DVC; what it has already is not sent again."""
    run_command("push", [sys.executable, "-m", "dvc", "push", *stages])


def _flow_variables() -> dict[str, str]:
    """Names the flow run to the processes that it starts, which record it."""
    variables = {"SFGRPO_FLOW_RUN_ID": flow_run.id, "SFGRPO_FLOW_RUN_URL": flow_run.ui_url}
    return {name: str(value) for name, value in variables.items() if value is not None}
