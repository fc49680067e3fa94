"""The local stack as it really runs: healthy, healed, kept, closed, and gone when it is told to go."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.stack.credentials import ensure_secrets
from infra.stack.programs.table import PROGRAMS
from infra.stack.supervision import running_supervisor
from tests.support.stack import Stack, wait_until

pytestmark = [pytest.mark.stack, pytest.mark.slow]

MAX_START_S = 120
"""What a start may take from an empty folder."""
ARTIFACT_SIZE = 20 * 2**20
PART_SIZE = 8 * 2**20
FLOW = """
    import os
    import time
    from pathlib import Path

    from prefect import flow

    @flow
    def tell(path: str) -> None:
        Path(path).write_text("\\n".join(f"{name}={value}" for name, value in os.environ.items()))

    @flow
    def wait(path: str) -> None:
        Path(path).touch()
        time.sleep(600)
"""
DEPLOY_AND_RUN = """
    import sys
    from prefect import flow
    from prefect.deployments import run_deployment

    name, folder, answer, timeout = sys.argv[1:]
    source = flow.from_source(folder, f"flows.py:{name}")
    deployment = source.deploy(name, work_pool_name="sfgrpo", print_next_steps=False, ignore_warnings=True)
    run = run_deployment(deployment, parameters={"path": answer}, timeout=int(timeout), poll_interval=1)
    print(run.state.name)
"""
LOG_RUN = """
    import sys
    import mlflow

    with mlflow.start_run() as run:
        mlflow.log_metric("answer", 42)
        mlflow.log_artifact(sys.argv[1])
    print(run.info.run_id)
"""
FETCH_RUN = """
    import sys
    import mlflow

    run = mlflow.get_run(sys.argv[1])
    path = mlflow.artifacts.download_artifacts(run_id=sys.argv[1], artifact_path="weights.bin", dst_path=sys.argv[2])
    print(run.data.metrics["answer"])
"""


def run_script(script: str, *arguments: str | Path, environment: Mapping[str, str]) -> str:
    """Run Python code as a user of the stack does; return the last line that it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def s3_of(stack: Stack) -> Any:
    import boto3

    environment = stack.environment
    return boto3.session.Session().client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


@pytest.fixture(scope="module")
def logged(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A run in MLflow with one artifact, sent as a large file is: its id and the content."""
    weights = tmp_path_factory.mktemp("artifact") / "weights.bin"
    weights.write_bytes(os.urandom(ARTIFACT_SIZE))
    sizes = {
        "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(PART_SIZE),
        "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": str(PART_SIZE),
    }
    run_id = run_script(LOG_RUN, weights, environment=stack.environment | sizes)
    return run_id, weights.read_bytes()


def test_an_empty_folder_becomes_a_healthy_stack_in_time(stack: Stack) -> None:
    begin = psutil.Process(running_pid(stack)).create_time()
    found = stack.status()
    assert found.keys() == PROGRAMS.keys()
    assert {entry["health"] for entry in found.values()} == {"healthy"}
    assert {entry["state"] for entry in found.values()} == {"RUNNING"}
    assert all(psutil.pid_exists(entry["pid"]) for entry in found.values())
    assert max(entry["uptime_s"] for entry in found.values()) <= time.time() - begin + 1
    assert stack.first_start_s < MAX_START_S
    assert stack.command("status").returncode == 0


def running_pid(stack: Stack) -> int:
    supervisor = running_supervisor(stack.folder)
    assert supervisor is not None
    return supervisor.pid


def test_a_stack_that_runs_is_left_alone(stack: Stack) -> None:
    before = {name: entry["pid"] for name, entry in stack.status().items()}
    printed = stack.start()
    assert {name: entry["pid"] for name, entry in stack.status().items()} == before
    for name, program in stack.status().items():
        assert f"{name:10}healthy after" in printed and program["address"] in printed
    assert "/s/env" in printed and "make deploy" in printed


def test_a_running_stack_keeps_its_settings(stack: Stack) -> None:
    done = stack.command("up", STACK_S3_PORT="1234")
    assert done.returncode == 2
    port = stack.variables["STACK_S3_PORT"]
    assert (
        f"STACK_S3_PORT: the stack in {stack.folder.root} runs with {port}, not 1234; `make stack-down`" in done.stderr
    )


def test_a_program_that_was_stopped_is_started(stack: Stack) -> None:
    supervisor = running_supervisor(stack.folder)
    assert supervisor is not None
    supervisor.stop("worker")
    done = stack.command("status")
    assert done.returncode == 1 and "it does not run" in done.stdout
    stack.start()
    assert stack.command("status").returncode == 0


def test_buckets_are_there_and_keep_what_must_not_get_lost(stack: Stack) -> None:
    s3 = s3_of(stack)
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} == {"runs", "dvc", "mlflow"}
    versioned = {name: s3.get_bucket_versioning(Bucket=name).get("Status") for name in ("runs", "dvc", "mlflow")}
    assert versioned == {"runs": "Enabled", "dvc": "Enabled", "mlflow": None}


def test_a_large_artifact_goes_to_s3_in_parts(stack: Stack, logged: tuple[str, bytes], tmp_path: Path) -> None:
    run_id, content = logged
    s3 = s3_of(stack)
    (entry,) = s3.list_objects_v2(Bucket="mlflow")["Contents"]
    assert entry["Key"].endswith(f"{run_id}/artifacts/weights.bin")
    assert entry["ETag"].strip('"').endswith("-3")
    log = stack.folder.log("mlflow").read_text(encoding="utf-8")
    assert "/mlflow-artifacts/mpu/complete/" in log
    assert run_script(FETCH_RUN, run_id, tmp_path, environment=stack.environment) == "42.0"
    assert (tmp_path / "weights.bin").read_bytes() == content


def test_a_flow_run_of_the_worker_has_the_environment_of_the_stack(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(textwrap.dedent(FLOW), encoding="utf-8")
    answer = tmp_path / "answer"
    assert run_script(DEPLOY_AND_RUN, "tell", tmp_path, answer, "120", environment=stack.environment) == "Completed"
    told = dict(line.split("=", 1) for line in answer.read_text(encoding="utf-8").splitlines() if "=" in line)
    own = {line.removeprefix("export ").split("=")[0] for line in stack.folder.env.read_text().splitlines()}
    assert {name: told.get(name) for name in own} == {name: stack.environment[name] for name in own}
    assert told["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_killed_comes_back(stack: Stack, program: str) -> None:
    before = stack.pid(program)
    found = stack.kill_and_heal(program)
    assert found[program]["pid"] not in (0, before)


def test_data_survive_a_stop_that_leaves_nothing_running(
    stack: Stack, logged: tuple[str, bytes], tmp_path: Path
) -> None:
    run_id, content = logged
    secrets = stack.folder.secrets.read_bytes()
    (tmp_path / "flows.py").write_text(textwrap.dedent(FLOW), encoding="utf-8")
    run_script(DEPLOY_AND_RUN, "wait", tmp_path, tmp_path / "waits", "0", environment=stack.environment)
    wait_until((tmp_path / "waits").exists, "the flow run does not start")
    assert "stopped; its data are kept" in stack.stop()
    assert stack.processes() == []
    assert running_supervisor(stack.folder) is None
    assert {entry["state"] for entry in stack.status().values()} == {"STOPPED"}
    stack.start()
    assert stack.folder.secrets.read_bytes() == secrets
    assert run_script(FETCH_RUN, run_id, tmp_path, environment=stack.environment) == "42.0"
    assert (tmp_path / "weights.bin").read_bytes() == content
    # The flow run that was under way has told its end, though all was about to go.
    script = "from prefect.client.orchestration import get_client\n"
    script += "with get_client(sync_client=True) as client:\n"
    script += "    print({run.state_name for run in client.read_flow_runs() if not run.state.is_completed()})"
    assert run_script(script, environment=stack.environment) == "{'Crashed'}"


def test_no_secret_is_in_a_command_line_a_log_or_a_configuration(stack: Stack) -> None:
    secrets = dataclasses.asdict(ensure_secrets(stack.folder.secrets)).values()
    commands = "\n".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    assert str(stack.folder.root) in commands
    assert not [secret for secret in secrets if secret in commands]
    folders = [stack.folder.logs, stack.folder.private, stack.folder.data("mlflow"), stack.folder.data("prefect")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [stack.folder.configuration, stack.folder.settings]
    assert {"mlflow.log", "log", "supervisord.conf"} <= {path.name for path in files}
    assert not [path for path in files for secret in secrets if secret.encode() in path.read_bytes()]
    # Where they have to be, only the owner gets at them.
    for path in (stack.folder.env, stack.folder.secrets):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_program_that_cannot_start_is_told_with_its_last_words() -> None:
    stack = Stack()
    try:
        broken = stack.folder.data("postgres") / "cluster"
        broken.mkdir(parents=True)
        done = stack.command("up")
        assert done.returncode == 1
        log = stack.folder.log("postgres")
        assert f"error: postgres does not become healthy: it does not run; the last lines of {log} are" in done.stderr
        assert done.stderr.splitlines()[-1] == f"  {log.read_text(encoding='utf-8').splitlines()[-1]}"
    finally:
        stack.remove()
