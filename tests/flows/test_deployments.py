"""Deployments on a real Prefect server with a real worker: worktrees, branches, queues, crashes, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
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
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from ruamel.yaml import YAML

from flows.deploy import RESUMPTION, ZOMBIES
from sfgrpo.config.stages import PromptsStage, load_config
from sfgrpo.prompts import make_prompts, write_prompts
from tests.support.stub_pipeline import ROOT, STUB, build_stub_pipeline, calls

pytestmark = [
    pytest.mark.slow,
    # Not ours to mend: Prefect's own deprecations and unclosed sockets.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

START_S = 180
RUN_S = 180
UPKEEP = """
REPORTS = {{
    "close-stale-runs": {{
        "at_work": [],
        "closed": [{{"name": "joint-1", "run_id": "r1", "owner": "process 7 of here", "silent_s": 7200}}],
        "silent": [],
    }},
    "retention": {{
        "removed": [{{"name": "train-1", "place": "/scratch/train-1", "num_bytes": 2500000}}],
        "kept": ["train-2"],
        "branches": [],
    }},
}}
if stage in REPORTS:
    pathlib.Path(sys.argv[-1]).write_text(json.dumps(REPORTS[stage]))
    sys.exit()
if stage == "recheck":
    pathlib.Path("reports").mkdir(exist_ok=True)
    found = {{"drifted": pathlib.Path({folder!r}, "drifted").exists(), "table": "| then | now |"}}
    pathlib.Path("reports/recheck.json").write_text(json.dumps(found))
    sys.exit()
if stage == "promote":
    pathlib.Path("reports/promotion").mkdir(parents=True, exist_ok=True)
    decision = {{"model": "stub", "version": 7, "promoted": True, "run_id": "r7"}}
    pathlib.Path("reports/promotion/decision.json").write_text(json.dumps(decision))
    pathlib.Path("reports/promotion/report.md").write_text("better beyond doubt")
    sys.exit()
prepared = pathlib.Path({folder!r}, "prepared")
if stage == "prompts" and prepared.exists():
    import shutil
    shutil.copytree(prepared, "data/prompts", dirs_exist_ok=True)
    sys.exit()
"""
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
        stub = STUB.replace('"calls.txt"', repr(f"{folder}/calls.txt")).replace(
            "OUTPUTS = {", UPKEEP.format(folder=folder) + "OUTPUTS = {", 1
        )
        stub += HOLD.format(folder=folder)
        (self.project / "sfgrpo/__main__.py").write_text(stub)
        for name in ("flows", "tasks"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
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

    def start_worker(self) -> None:
        self.start("worker", "prefect", "worker", "start", "--pool", "sfgrpo", "--type", "process")

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
        platform.start_worker()
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
    """Keep trainings from ending within the block."""
    hold = platform.project / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def flow_processes(run_id: UUID) -> list[psutil.Process]:
    """List the processes of the flow itself, by the variable that the worker gives it; not those of its stages."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id)
            if ours and "STAGE_SUPERVISOR" not in process.environ() and "tasks.supervisor" not in process.cmdline():
                found.append(process)
    return found


def test_a_run_ends_in_a_version_a_branch_and_data_in_the_remote(platform, client):
    before = platform.git("status", "--porcelain"), platform.git("rev-parse", "HEAD")
    run = ended(client, platform, start_run(client, "train-policy/weekly", {"changes": {"update.num_updates": 4}}))
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    assert calls(platform.project) == ["prompts", "train", "evaluate", "register", "promote", "promote"]
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


def test_a_clone_gets_the_files_of_a_run_from_its_branch(platform, client, tmp_path):
    run = ended(client, platform, start_run(client, "train-policy/weekly"))
    subprocess.run(
        ["git", "clone", "--quiet", "--branch", f"runs/{run.name}", platform.project, tmp_path / "clone"], check=True
    )
    dvc = [sys.executable, "-m", "dvc"]
    for arguments in (
        ["remote", "add", "--local", "--default", "store", str(platform.remote)],
        ["pull", "--quiet", "dvc.yaml"],
    ):
        subprocess.run([*dvc, *arguments], cwd=tmp_path / "clone", check=True, capture_output=True)
    assert (tmp_path / "clone/reports/evaluate/table.md").read_text().startswith("| task |")


def test_deploying_again_changes_nothing(platform, client):
    deployment = client.read_deployment_by_name("train-policy/weekly")
    (schedule,) = deployment.schedules
    assert (schedule.active, schedule.schedule.cron, schedule.schedule.timezone) == (
        False,
        "0 2 * * 6",
        "Europe/Berlin",
    )
    client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    before = everything(client)
    again = platform.deploy()
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith("work pool sfgrpo is there, of type process\nlimit gpu is there, slots 1\n")
    assert f"automation is there: {ZOMBIES.name}\nautomation is there: {RESUMPTION.name}\n" in again.stdout
    after = everything(client)
    client.update_deployment_schedule(deployment.id, after["train-policy/weekly"]["schedules"][0], active=False)
    assert after == before
    assert (
        f"train-policy/weekly: {platform.url.removesuffix('/api')}/deployments/deployment/{deployment.id}"
        in again.stdout
    )


def test_a_deployment_under_an_earlier_name_is_removed(platform, client):
    client.create_deployment(client.create_flow_from_name("sweep"), "every-10-minutes")
    answer = platform.deploy()
    assert "deployment removed: sweep/every-10-minutes; it is now close-stale-runs/every-10-minutes" in answer.stdout
    with pytest.raises(ObjectNotFound):
        client.read_deployment_by_name("sweep/every-10-minutes")


def everything(client: SyncPrefectClient) -> dict[str, Any]:
    """List everything that deploying again must not change."""
    deployments = {
        f"{client.read_flow(found.flow_id).name}/{found.name}": {
            "id": found.id,
            "schedules": [schedule.id for schedule in found.schedules],
            "active": [schedule.active for schedule in found.schedules],
            "limit": (found.global_concurrency_limit.limit, found.concurrency_options.collision_strategy),
            "schema": found.parameter_openapi_schema,
        }
        for found in client.read_deployments()
    }
    automations = {found.name: (found.id, found.enabled) for found in client.read_automations()}
    return {**deployments, "automations": automations}


def test_parameters_can_be_filled_in_by_a_person(client):
    properties = client.read_deployment_by_name("train-policy/weekly").parameter_openapi_schema["properties"]
    assert "by dotted name" in properties["changes"]["description"]
    assert "Edition of the training prompts" in properties["prompts_edition"]["description"]
    assert properties["prompts_edition"]["anyOf"][0]["minimum"] == 0


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
    ran = [stage for stage in calls(platform.project) if stage not in ("prompts", "promote")]
    assert ran == ["train", "evaluate", "register", "register"]


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
    ran = [stage for stage in calls(platform.project) if stage not in ("prompts", "promote")]
    assert ran == ["train", "train", "evaluate", "register"]
    assert platform.git("rev-parse", f"runs/{run.name}")


def test_a_run_whose_time_has_passed_is_started_late(platform, client):
    deployment = client.read_deployment_by_name("close-stale-runs/every-10-minutes")
    missed = Scheduled(scheduled_time=datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=5))
    run = ended(client, platform, client.create_flow_run_from_deployment(deployment.id, state=missed).id)
    assert run.state.name == "Completed"
    assert run.start_time - run.expected_start_time > datetime.timedelta(hours=5)


def test_a_run_outlives_its_worker(platform, client):
    with held(platform):
        run_id = start_run(client, "train-policy/weekly", {"changes": {"update.num_updates": 7}})
        wait_for(lambda: "train" in calls_so_far(platform))
        worker = platform.processes["worker"]
        worker.kill()
        worker.wait()
        platform.start_worker()
    run = ended(client, platform, run_id)
    assert (run.state.name, run.run_count) == ("Completed", 1), platform.log("worker")[-5000:]


def calls_so_far(platform: Platform) -> list[str]:
    path = platform.project / "calls.txt"
    return path.read_text().split() if path.exists() else []


def artifact(client: SyncPrefectClient, run_id: UUID) -> str:
    """Return the only Markdown artifact of a run."""
    (found,) = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), type=ArtifactFilterType(any_=["markdown"])
        )
    )
    return str(found.data)


def test_stale_runs_are_closed_and_what_dead_supervisors_left_is_ended(platform, client):
    folder = platform.project / ".worktrees" / "gone"
    mark = {"STAGE_SUPERVISOR": f"1 0.0 {folder}"}
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, **mark}, start_new_session=True
    )
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, "STAGE_SUPERVISOR": f"1 0.0 {platform.project.parent / 'elsewhere'}"},
    )
    try:
        run = ended(client, platform, start_run(client, "close-stale-runs/every-10-minutes"))
        assert run.state.name == "Completed"
        assert orphan.wait(10) == -signal.SIGTERM
        assert stranger.poll() is None
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.wait()
    told = artifact(client, run.id)
    assert "closed 1, silent 0. Processes ended: 1." in told
    assert "| joint-1 `r1` | process 7 of here | 2.0 | closed as KILLED, since its process is gone |" in told


def test_champion_that_drifted_fails_the_run_and_shows_the_table(platform, client):
    run = ended(client, platform, start_run(client, "watch-champion/nightly"))
    assert (run.state.name, artifact(client, run.id)) == ("Completed", "| then | now |")
    (platform.project / "drifted").touch()
    run = ended(client, platform, start_run(client, "watch-champion/nightly"))
    assert (run.state.name, artifact(client, run.id)) == ("Failed", "| then | now |")
    assert "the champion's images differ from those of its promotion" in run.state.message
    assert not (platform.project / ".worktrees" / str(run.id)).exists()


@pytest.fixture
def prepared(platform: Platform) -> Iterator[Path]:
    """A folder of prompt sets that the stub hands out while it exists."""
    folder = platform.project / "prepared"
    yield folder
    shutil.rmtree(folder)


def test_refreshed_prompts_are_kept_and_then_taken_by_the_next_training(platform, client, prepared):
    wanted = load_config(PromptsStage, ROOT / "params.yaml")
    split = make_prompts(dataclasses.replace(wanted, prompts=dataclasses.replace(wanted.prompts, edition=1)))
    write_prompts(prepared / "train.jsonl", split.training)
    write_prompts(prepared / "validation.jsonl", split.validation)
    write_prompts(prepared / "evaluation.jsonl", split.evaluation[:-1])
    refused = ended(client, platform, start_run(client, "refresh-prompts/monthly"))
    assert refused.state.name == "Failed"
    assert "evaluation.jsonl: holds 115 prompts, but params.yaml asks for 116" in refused.state.message
    assert client.read_variable_by_name("prompts_edition") is None

    write_prompts(prepared / "evaluation.jsonl", split.evaluation)
    run = ended(client, platform, start_run(client, "refresh-prompts/monthly", {"edition": 2, "num_examples": 1}))
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    assert client.read_variable_by_name("prompts_edition").value == 2
    branch = f"runs/{run.name}"
    assert "edition: 2" in platform.git("show", f"{branch}:params.yaml")
    told = artifact(client, run.id)
    assert f"Edition 2, on branch {branch}." in told
    assert "| position | 500 | 48 | 32 | 40 |" in told
    assert told.endswith(f"- {split.training[0].text}")

    run = ended(client, platform, start_run(client, "train-policy/weekly"))
    assert run.state.name == "Completed"
    assert "edition: 2" in platform.git("show", f"runs/{run.name}:params.yaml")


def test_retention_removes_what_is_old_and_only_lists_data_unless_told(platform, client):
    kept = ended(client, platform, start_run(client, "train-policy/weekly", {"prompts_edition": 0}))
    failed = ended(client, platform, start_run(client, "refresh-prompts/monthly", {"edition": 9}))
    worktree = platform.project / ".worktrees" / str(failed.id)
    cache = platform.project / ".dvc/cache/files"
    num_files = sum(path.is_file() for path in cache.rglob("*"))
    assert (failed.state.name, worktree.exists()) == ("Failed", True)

    run = ended(client, platform, start_run(client, "retention/daily"))
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    told = artifact(client, run.id)
    assert "| state of train-1 | /scratch/train-1 | 2.5 | removed |" in told
    assert "| data of DVC | cache | | only listed, in the log of the task `dvc gc` |" in told
    assert told.endswith("finished too recently or not at all: train-2")
    assert worktree.exists() and platform.git("rev-parse", f"runs/{kept.name}")
    assert sum(path.is_file() for path in cache.rglob("*")) == num_files

    everything = {"worktree_days": 0, "branch_days": 0, "rehearse_data": False}
    platform.git("branch", "runs/of-a-person", "HEAD")
    run = ended(client, platform, start_run(client, "retention/daily", everything))
    assert run.state.name == "Completed", platform.log("worker")[-5000:]
    told = artifact(client, run.id)
    assert f"| worktree | {failed.id} |" in told and f"| branch | runs/{kept.name} |" in told
    assert not worktree.exists()
    assert platform.git("for-each-ref", "--format=%(refname:short)", "refs/heads/runs/") == "runs/of-a-person"
    assert sum(path.is_file() for path in cache.rglob("*")) == 0


def test_data_is_left_alone_while_a_run_is_at_work(platform, client):
    with held(platform):
        training = start_run(client, "train-policy/weekly", {"changes": {"update.num_updates": 8}})
        wait_for(lambda: "train" in calls_so_far(platform))
        run = ended(client, platform, start_run(client, "retention/daily", {"rehearse_data": False}))
        assert "left alone: a run is at work" in artifact(client, run.id)
    assert ended(client, platform, training).state.name == "Completed"
