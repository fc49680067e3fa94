"""The flow against a real Prefect server and real DVC: order, failure, retry, resume, refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.train_policy import main, train_policy
from tasks import stages
from tasks.stages import StageError, refuse_inside_stage
from tests.support.stub_pipeline import build_stub_pipeline, calls, stub_environment

# Not ours to mend: Prefect's own deprecations and unclosed sockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build_stub_pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    for task in (stages.prompts, stages.train, stages.evaluate, stages.register):
        monkeypatch.setattr(task, "retry_delay_seconds", 0)
    return tmp_path


@pytest.mark.slow
def test_second_flow_runs_registration_only(server, pipeline):
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", "train", "evaluate", "register"]
    assert train_policy(promote=False) == {"name": "stub", "version": 7, "alias": "challenger"}
    assert calls(pipeline) == ["register"]


@pytest.mark.slow
def test_failing_stage_fails_the_flow_with_its_own_error(server, pipeline, capsys):
    (pipeline / "fail_train").write_text("1")
    assert main() == 1
    assert calls(pipeline) == ["prompts", "train", "train", "train"]
    last_lines = capsys.readouterr().err.rpartition("stage train failed with exit status 1")[2]
    assert "PolicyError: the stub was told to fail" in last_lines


@pytest.mark.slow
def test_wrong_parameters_are_not_retried(server, pipeline):
    (pipeline / "fail_prompts").write_text("2")
    with pytest.raises(StageError, match="PolicyError: the stub was told to fail"):
        train_policy(promote=False)
    assert calls(pipeline) == ["prompts"]


@pytest.mark.slow
def test_preempted_training_goes_on_without_using_up_its_retries(server, pipeline, monkeypatch):
    monkeypatch.setattr(stages, "RETRY_DELAY_S", 0)
    (pipeline / "preempt_train").write_text("4")
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", *["train"] * 5, "evaluate", "register"]


@pytest.mark.slow
def test_crashed_training_resumes_on_retry(server, pipeline):
    (pipeline / "crash_once").touch()
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", "train", "train", "evaluate", "register"]
    log = (pipeline / "logs/train.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("update")] == [
        "update 2 starting from 2",
        "update 3 starting from 2",
    ]


@pytest.mark.slow
def test_module_runs_without_a_server_and_ends_with_the_outcome(tmp_path):
    build_stub_pipeline(tmp_path)
    environment = {key: value for key, value in stub_environment().items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.train_policy"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "| overall | 0.10 | 0.50 |" in run.stdout
    assert "reports/evaluate/samples.png" in run.stdout
    assert run.stdout.strip().endswith("model version 7 registered: stub@challenger")
    assert (tmp_path / ".prefect/prefect.db").exists()


def test_flow_refuses_to_run_inside_a_stage(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(RuntimeError, match="DVC stage train started the flow"):
        refuse_inside_stage()


def test_flow_starts_outside_a_stage(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    refuse_inside_stage()
    assert "DVC_STAGE" not in os.environ
