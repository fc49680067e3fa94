"""Deployments on a real Prefect server with a real worker: worktrees, branches, queues, crashes, refusals."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML
from stub_pipeline import ROOT, STUB, build_stub_pipeline, calls

pytestmark = [
    pytest.mark.slow,
    # Not ours to mend: Prefect's own deprecations and unclosed sockets.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

START_S = 180
RUN_S = 180
HOLD = """
while pathlib.Path({folder!r}, "hold").exists() and stage == "train":
    import time
    print("update 1/4  reward 0.5", flush=True)
    time.sleep(0.2)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], within_s: float = RUN_S, told: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {told()}"
        time.sleep(0.2)
    return found


class Platform:
    """A project around the stub of sfgrpo in a git repository, a Prefect server, and a worker in the project."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.remote = folder / "remote"
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        port = free_port()
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PREFECT_", "GIT_", "SFGRPO_"))
            },
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "SFGRPO_DVC_REMOTE": str(self.remote),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return self.environment["PREFECT_API_URL"]

    def build(self) -> None:
        self.project.mkdir()
        build_stub_pipeline(self.project)
        folder = str(self.project)
        stub = STUB.replace('"calls.txt"', repr(f"{folder}/calls.txt")) + HOLD.format(folder=folder)
        (self.project / "sfgrpo/__main__.py").write_text(stub)
        for name in ("flows", "tasks"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        if not (ROOT / "flows/promote.py").exists():
            (self.project / "flows/promote.py").write_text(
                "from prefect import flow\n\n@flow\ndef promote() -> None:\n    pass\n"
            )
        for name in ("prefect.yaml", ".dvc/.gitignore"):
            shutil.copy(ROOT / name, self.project / name)
        self.git("add", "--all")
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        self.git(*identity, "commit", "--quiet", "--message", "Project")

    def git(self, *arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=self.project, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    def start(self, name: str, *arguments: str) -> None:
        with (self.logs / name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.project,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.logs / name).read_text(errors="replace")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False

    def deploy(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.deploy"]
        return subprocess.run(command, cwd=self.project, env=self.environment, capture_output=True, text=True)

    def stop(self) -> None:
        for process in self.processes.values():
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            process.wait()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    platform = Platform(tmp_path_factory.mktemp("platform"))
    platform.build()
    try:
        platform.start("server", "prefect", "server", "start")
        wait_for(platform.answers, START_S, lambda: platform.log("server"))
        first = platform.deploy()
        assert first.returncode == 0, first.stdout + first.stderr
        platform.start("worker", "prefect", "worker", "start", "--pool", "sfgrpo", "--type", "process")
        with temporary_settings({PREFECT_API_URL: platform.url}):
            yield platform
    finally:
        platform.stop()


@pytest.fixture
def client(platform: Platform) -> Iterator[SyncPrefectClient]:
    calls(platform.project)
    with get_client(sync_client=True) as client:
        yield client


def start_run(client: SyncPrefectClient, name: str, parameters: Mapping[str, Any] | None = None) -> UUID:
    deployment = client.read_deployment_by_name(name)
    return client.create_flow_run_from_deployment(deployment.id, parameters=dict(parameters or {})).id


def state_name(client: SyncPrefectClient, run_id: UUID) -> str:
    return client.read_flow_run(run_id).state.name


def ended(client: SyncPrefectClient, platform: Platform, run_id: UUID) -> FlowRun:
    wait_for(
        lambda: client.read_flow_run(run_id).state.is_final(),
        told=lambda: f"{client.read_flow_run(run_id).state}\n{platform.log('worker')[-5000:]}",
    )
    return client.read_flow_run(run_id)


@contextlib.contextmanager
def held(platform: Platform) -> Iterator[None]:
    """Keeps trainings from ending within the block."""
    hold = platform.project / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def flow_processes(run_id: UUID) -> list[psutil.Process]:
    """Lists the processes of the flow itself, by the variable that the worker gives it; not those of its stages."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id)
            if ours and "STAGE_SUPERVISOR" not in process.environ() and "supervisor.py" not in str(process.cmdline()):
                found.append(process)
    return found


def test_a_run_ends_in_a_version_a_branch_and_data_in_the_remote(platform, client):
    before = platform.git("status", "--porcelain"), platform.git("rev-parse", "HEAD")
    run = ended(client, platform, start_run(client, "train-policy/weekly", {"changes": {"update.num_updates": 4}}))
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    assert calls(platform.project) == ["prompts", "train", "evaluate", "register"]
    assert (platform.git("status", "--porcelain"), platform.git("rev-parse", "HEAD")) == before
    assert not (platform.project / "models/policy").exists()
    branch = f"runs/{run.name}"
    assert str(run.id) in platform.git("log", "-1", "--format=%B", branch)
    changed = platform.git("diff", "--name-only", "HEAD", branch).split()
    assert changed == ["dvc.lock", "params.yaml"]
    assert "num_updates: 4" in platform.git("show", f"{branch}:params.yaml")
    assert platform.git("show", f"{branch}:params.yaml").count("#") == platform.git("show", "HEAD:params.yaml").count(
        "#"
    )
    assert not (platform.project / ".worktrees" / str(run.id)).exists()
    assert len(platform.git("worktree", "list").splitlines()) == 1
    lock = YAML(typ="safe").load(platform.git("show", f"{branch}:dvc.lock"))
    listed = {output["md5"] for stage in lock["stages"].values() for output in stage["outs"]}
    assert len(listed) == 4
    assert listed <= {file.parent.name + file.name for file in platform.remote.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"update.num_update": 3}, r"update.num_update: .* did you mean num_updates"),
        ({"update.num_updates": -3}, r"update.num_updates: .*-3"),
    ],
)
def test_wrong_parameters_are_refused_in_one_sentence_before_anything_is_made(platform, client, changes, complaint):
    run = ended(client, platform, start_run(client, "train-policy/weekly", {"changes": changes}))
    assert run.state.name == "Failed"
    assert re.search(complaint, run.state.message), run.state.message
    assert not (platform.project / ".worktrees" / str(run.id)).exists()
    assert calls(platform.project) == []


def test_two_runs_at_once_are_done_one_after_the_other(platform, client):
    changes = {"update.num_updates": 5}
    with held(platform):
        first = start_run(client, "train-policy/weekly", {"changes": changes})
        wait_for(lambda: "train" in calls_so_far(platform))
        second = start_run(client, "train-policy/weekly", {"changes": changes})
        wait_for(lambda: state_name(client, second) == "AwaitingConcurrencySlot")
        assert state_name(client, first) == "Running"
    assert ended(client, platform, first).state.name == "Completed"
    assert ended(client, platform, second).state.name == "Completed"
    assert [stage for stage in calls(platform.project) if stage != "prompts"] == [
        "train",
        "evaluate",
        *["register"] * 2,
    ]


def test_a_run_whose_process_is_killed_goes_on_as_the_same_run(platform, client):
    with held(platform):
        run_id = start_run(client, "train-policy/weekly", {"changes": {"update.num_updates": 6}})
        wait_for(lambda: "train" in calls_so_far(platform))
        worktree = platform.project / ".worktrees" / str(run_id)
        assert worktree.exists()
        for process in flow_processes(run_id):
            process.send_signal(signal.SIGKILL)
        wait_for(lambda: client.read_flow_run(run_id).run_count == 2, told=lambda: str(client.read_flow_run(run_id)))
    run = ended(client, platform, run_id)
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    assert run.run_count == 2
    assert not worktree.exists()
    trained = [stage for stage in calls(platform.project) if stage != "prompts"]
    assert trained == ["train", "train", "evaluate", "register"]
    assert platform.git("rev-parse", f"runs/{run.name}")


def calls_so_far(platform: Platform) -> list[str]:
    path = platform.project / "calls.txt"
    return path.read_text().split() if path.exists() else []
