"""Deployments of a clone of the repository on a local stack, and what they leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import LogSort
from prefect.states import Scheduled

from sfgrpo.checkpoint.state import update_of
from sfgrpo.runtime.process import is_running
from sfgrpo.tracking.mlflow_client import connect
from tests.support.stack import Stack

RUN_S = 600.0
"""A run of seconds takes minutes on a busy machine."""
ORPHAN_S = 60.0
"""How long anything may outlive the run that it belongs to."""
POLL_S = 0.5
CHECKPOINT_POLL_S = 0.02
NUM_SHOWN_LINES = 40
TRAINING = "train-policy/weekly"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a training left behind."""

    version: int
    adapter_sha256: str
    mlflow_run_id: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A clone that was deployed to a stack, whose worker runs what is scheduled."""

    stack: Stack
    folder: Path
    """The clone."""
    model: str
    """Registered model that the clone's trainings make versions of."""
    environment: Mapping[str, str] = dataclasses.field(repr=False)
    """That of a user who has activated the virtual environment and sourced the stack's file."""
    durations: dict[str, float] = dataclasses.field(default_factory=dict)
    """What took how many seconds, for whoever reads the tests' output."""

    @property
    def mlflow(self) -> MlflowClient:
        return connect(self.environment["MLFLOW_TRACKING_URI"])

    @property
    def s3(self) -> Any:
        import boto3

        variables = self.environment
        return boto3.session.Session().client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
            region_name=variables["AWS_DEFAULT_REGION"],
        )

    def keys(self, bucket: str) -> list[str]:
        """List the objects of a bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    @contextlib.contextmanager
    def prefect(self) -> Iterator[SyncPrefectClient]:
        """A client of the stack's Prefect server."""
        with get_client(sync_client=True) as client:
            yield client

    def command(self, *arguments: str) -> str:
        """Run `python -m ...` in the clone; return its output; fail unless it succeeds."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def schedule(self, parameters: dict[str, Any], *, in_s: float = 0.0) -> UUID:
        """Schedule a training for so many seconds from now, below 0 for one that was missed."""
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=in_s)
        with self.prefect() as client:
            deployment = client.read_deployment_by_name(TRAINING)
            state = Scheduled(scheduled_time=when)
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters, state=state).id

    def read(self, run_id: UUID) -> FlowRun:
        with self.prefect() as client:
            return client.read_flow_run(run_id)

    def wait(self, run_id: UUID, condition: Callable[[FlowRun], bool], what: str, timeout_s: float = RUN_S) -> FlowRun:
        """Wait until a condition holds for a flow run; fail with the last lines of its logs if it never does."""
        deadline = time.monotonic() + timeout_s
        while not condition(run := self.read(run_id)):
            assert time.monotonic() < deadline, f"not {what} within {timeout_s:.0f} s\n{self.told(run_id)}"
            time.sleep(POLL_S)
        return run

    def wait_for_state(self, run_id: UUID, *names: str, timeout_s: float = RUN_S) -> FlowRun:
        return self.wait(run_id, lambda run: run.state_name in names, " or ".join(names), timeout_s)

    def completed(self, run_id: UUID) -> FlowRun:
        """Wait until a run has ended for good; fail unless it is completed."""
        # One that crashed is started again, unless that was done too often.
        run = self.wait(run_id, lambda run: run.state_name in ("Completed", "Failed", "Cancelled"), "done")
        assert run.state_name == "Completed", self.told(run_id)
        return run

    def worktree(self, run_id: UUID) -> Path:
        return self.folder / ".worktrees" / str(run_id)

    def saved_update(self, run_id: UUID) -> int:
        """Count the updates that the newest checkpoint of a run's training holds; 0 without any."""
        try:
            training = json.loads((self.worktree(run_id) / "reports/training.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
        return max(map(update_of, Path(training["folder"]).glob("checkpoints/update-*")), default=0)

    def wait_for_update(self, run_id: UUID, after: int = 0, timeout_s: float = RUN_S) -> int:
        """Wait until a run's training has saved more than so many updates; return how many. No server is asked."""
        deadline = time.monotonic() + timeout_s
        while (saved := self.saved_update(run_id)) <= after:
            assert time.monotonic() < deadline, (
                f"no update after number {after} within {timeout_s:.0f} s\n{self.told(run_id)}"
            )
            time.sleep(CHECKPOINT_POLL_S)
        return saved

    def trained(self, run_id: UUID) -> Run:
        """Find the MLflow run that a flow run trained last."""
        experiment = self.mlflow.get_experiment_by_name("sfgrpo")
        query = f"tags.`prefect.flow_run_id` = '{run_id}'"
        (found,) = self.mlflow.search_runs([experiment.experiment_id], query)
        return found

    def outcome(self, run_id: UUID) -> Outcome:
        """Find the version that a run registered, by the MLflow run that it trained."""
        trained = self.trained(run_id).info.run_id
        query = f"name = '{self.model}' and tags.parent_run_id = '{trained}'"
        (version,) = self.mlflow.search_model_versions(query)
        return Outcome(
            version=int(version.version), adapter_sha256=version.tags["adapter_sha256"], mlflow_run_id=trained
        )

    def sample(self, prompt: str) -> bytes:
        """Sample an image from the champion; return the PNG file."""
        out = self.folder / "sample.png"
        self.command("sfgrpo", "sample", "--model", f"models:/{self.model}@champion", "--out", str(out), prompt)
        image = out.read_bytes()
        out.unlink()
        return image

    def curve(self, mlflow_run_id: str, metric: str) -> list[tuple[int, float]]:
        """List the recorded steps and values of a metric, in the order of the steps."""
        return sorted((entry.step, entry.value) for entry in self.mlflow.get_metric_history(mlflow_run_id, metric))

    def alias(self, name: str) -> int:
        return int(self.mlflow.get_model_version_by_alias(self.model, name).version)

    def processes(self) -> list[psutil.Process]:
        """List the processes of flow runs of the stack, and all others that work in the clone or below it."""
        address = self.environment["PREFECT_API_URL"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                variables = process.environ()
                is_flow = "PREFECT__FLOW_RUN_ID" in variables and variables.get("PREFECT_API_URL") == address
                if is_flow or Path(process.cwd()).is_relative_to(self.folder):
                    found.append(process)
        return found

    def flow_processes(self, run_id: UUID) -> list[psutil.Process]:
        """List the processes of a flow itself, not those of its stages."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                variables = process.environ()
                is_flow = variables.get("PREFECT__FLOW_RUN_ID") == str(run_id) and "STAGE_SUPERVISOR" not in variables
                if is_flow and "tasks.supervisor" not in process.cmdline():
                    found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        """List the processes that train."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if [part for part in process.cmdline() if part != "-u"][1:4] == ["-m", "sfgrpo", "train"]:
                    found.append(process)
        return found

    @contextlib.contextmanager
    def trainers_held(self) -> Iterator[None]:
        """Suspend all trainings within the block, so that a training of seconds outlasts a longer operation."""
        trainers = self.trainers()
        for trainer in trainers:
            trainer.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for trainer in trainers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    trainer.send_signal(signal.SIGCONT)

    def wait_for_end(self, processes: Sequence[psutil.Process]) -> float:
        """Wait until none of the processes runs any more; return the seconds that it took."""
        begin = time.monotonic()
        while remaining := [process for process in processes if is_running(process)]:
            assert time.monotonic() < begin + ORPHAN_S, f"still there after {ORPHAN_S:.0f} s: {remaining}"
            time.sleep(POLL_S)
        return time.monotonic() - begin

    def running_in_mlflow(self) -> list[str]:
        """List the MLflow runs that say RUNNING, in all experiments."""
        experiments = [experiment.experiment_id for experiment in self.mlflow.search_experiments()]
        return [run.info.run_name for run in self.mlflow.search_runs(experiments, "attributes.status = 'RUNNING'")]

    def taken_slots(self) -> dict[str, int]:
        """Count the taken slots of each of Prefect's limits; leave out limits without any."""
        with self.prefect() as client:
            limits = client.read_global_concurrency_limits(limit=200, offset=0)
        return {limit.name: limit.active_slots for limit in limits if limit.active_slots}

    def told(self, run_id: UUID) -> str:
        """Collect state, processes and logs of a failed run."""
        lines = [f"state: {self.read(run_id).state}", f"processes: {self.processes()}"]
        with self.prefect() as client:
            wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
            logs = client.read_logs(wanted, limit=NUM_SHOWN_LINES, sort=LogSort.TIMESTAMP_DESC)
        lines += ["its last lines:", *(f"  {log.message}" for log in reversed(logs))]
        for path in [*sorted(self.worktree(run_id).glob("logs/*.log")), self.stack.folder.log("worker")]:
            lines += [f"the last of {path}:"]
            lines += [f"  {line}" for line in path.read_text(errors="replace").splitlines()[-NUM_SHOWN_LINES:]]
        return "\n".join(lines)


def environment_of(stack: Stack) -> dict[str, str]:
    """Return the environment of a user who has activated the virtual environment and sourced the stack's file."""
    variables = stack.environment
    return variables | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])}
