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

from sfgrpo.errors import ConfigError, ExitStatus, Preempted
from sfgrpo.paths import EVALUATE_REPORT, REGISTRATION
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.redaction import without_secrets
from tasks.progress import ProgressBar
from tasks.supervisor import is_stopping, run_supervised

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LOGS = Path("logs")
DVC_ADVICE = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
"""Starts of the lines that DVC prints around every stage; `--quiet` would hide its errors as well."""
NUM_SHOWN_LINES = 20
RETRY_DELAY_S = 5
STOPPED_MARK = "stopped: "
"""Start of the line in which a command that was told to stop says what it has saved."""
_unfinished: dict[str, str] = {}
"""What stages that did not end by themselves have said last about their state; empty for those that run."""


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
    """Raise if DVC runs this process: a stage that the flow starts would wait for the stage that started the flow."""
    if stage := os.environ.get("DVC_STAGE"):
        raise RuntimeError(f"DVC stage {stage} started the flow, which would wait for that stage; start it by itself")


def unfinished_stages() -> dict[str, str]:
    """Return the stages that run or were stopped, each with what it has said about its state."""
    return dict(_unfinished)


def dvc_repro(stage: str, file: str = "dvc.yaml") -> list[str]:
    """Return the command that brings one DVC stage up to date; stages may run side by side."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", f"{file}:{stage}"]


def run_command(
    stage: str,
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    *,
    stop: threading.Event | None = None,
) -> None:
    """Run a command under supervision and log its output without DVC's advice.

    A command that was told to stop is started again, as often as it takes, unless `stop_all` ended it.

    Args:
        stage: Name of the stage, for the log and for errors.
        command: Program and arguments.
        variables: Environment variables besides those of this process.
        on_line: Called with every line that is logged.
        stop: The command is ended once this is set.

    Raises:
        StageError: the command failed. The exit status is that of the stage when DVC reports one.
        Preempted: `stop_all` was called.
    """
    logger = get_run_logger()
    lines: deque[str] = deque(maxlen=NUM_SHOWN_LINES)

    def show(line: str) -> None:
        # Not only our own commands print here: DVC does, and what it loads.
        line = without_secrets(line)
        if not line.strip().startswith(DVC_ADVICE):
            lines.append(line)
            # The first rank knows what is saved; its launcher, which speaks after it, does not.
            if line.startswith(STOPPED_MARK) and not _unfinished.get(stage):
                _unfinished[stage] = line.removeprefix(STOPPED_MARK)
            logger.info("%s", line)
            on_line(line)

    grace_s, environment = _grace_of(stage), _environment(variables or {})
    _unfinished[stage] = ""
    while status := run_supervised(command, LOGS / f"{stage}.log", show, environment, grace_s=grace_s, stop=stop):
        status = _status_of_stage(status, lines)
        is_over = stop is not None and stop.is_set()
        is_resumable = status == ExitStatus.RESUMABLE and not is_over
        if is_stopping(within_s=RETRY_DELAY_S if is_resumable else 0.0):
            raise Preempted(f"stage {stage} was told to stop")
        if not is_resumable:
            _unfinished.pop(stage, None)
            raise StageError(stage, status, tuple(lines))
        logger.warning("stage %s was told to stop; it goes on from where it stopped", stage)
        lines.clear()
        _unfinished[stage] = ""
    _unfinished.pop(stage, None)


def _grace_of(stage: str) -> float:
    """Return the seconds that a stage has to save its state."""
    try:
        return read_environment().grace_s
    except ConfigError as error:
        raise StageError(stage, ExitStatus.WRONG_CONFIGURATION, str(error).splitlines()) from error


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    run = {"SFGRPO_FLOW_RUN_ID": flow_run.id, "SFGRPO_FLOW_RUN_URL": flow_run.ui_url}
    return {
        **os.environ,
        # Unbuffered, so that lines appear when they are printed, and errors after what led to them.
        "PYTHONUNBUFFERED": "1",
        **{name: str(value) for name, value in run.items() if value is not None},
        **variables,
        # The stages are `python -m sfgrpo ...`: of all Pythons, they need this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def _status_of_stage(status: int, lines: Sequence[str]) -> int:
    reported = re.findall(r"exited with (\d+)", "\n".join(lines))
    return int(reported[-1]) if reported else status


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether a failure may pass by itself: not wrong parameters, and not after this process was stopped."""
    error = state.result(raise_on_failure=False)
    return not is_stopping() and not (isinstance(error, StageError) and error.status == ExitStatus.WRONG_CONFIGURATION)


def stage_task(
    name: str, run_name: str | None = None
) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Return a task decorator with the shared options; `run_name` may hold parameters of the task in braces."""
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
    """Write the prompt sets."""
    run_command("prompts", dvc_repro("prompts"))


@stage_task("train")
def train() -> None:
    """Train the policy; a retry resumes from the last checkpoint."""
    run_command("train", dvc_repro("train"), on_line=ProgressBar("training").show)


@stage_task("evaluate")
def evaluate() -> dict[str, Any]:
    """Compare the policy with the base model; return the metrics."""
    run_command("evaluate", dvc_repro("evaluate"))
    return cast(dict[str, Any], json.loads((EVALUATE_REPORT / "metrics.json").read_text(encoding="utf-8")))


@stage_task("register")
def register(branch: str | None = None) -> dict[str, Any]:
    """Register the policy; return name, number and alias of the version. The version records the run's branch.

    This is no DVC stage: DVC would skip it, or restore it from a cache, on a machine whose registry lacks the version.
    It runs in its own process so that the flow never holds a model, and so that it is killed and retried like a stage.
    """
    REGISTRATION.unlink(missing_ok=True)
    variables = {} if branch is None else {"SFGRPO_BRANCH": branch}
    run_command("register", [sys.executable, "-m", "sfgrpo", "register"], variables)
    return cast(dict[str, Any], json.loads(REGISTRATION.read_text(encoding="utf-8")))


@stage_task("push")
def push(stages: Sequence[str]) -> None:
    """Copy the outputs of some stages to DVC's remote; what is there already is not sent again."""
    run_command("push", [sys.executable, "-m", "dvc", "push", *stages])
