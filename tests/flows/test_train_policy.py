"""The flow against a real Prefect server and real DVC: order, failure, retry, resume, refusal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.train_policy import main, train_policy
from tasks import stages
from tasks.git import git
from tasks.stages import StageError, refuse_inside_stage
from tests.support.stub_pipeline import build_stub_pipeline, calls

# Not ours to mend: Prefect's own deprecations and unclosed sockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build_stub_pipeline(tmp_path)
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "First")
    monkeypatch.chdir(tmp_path)
    for task in (stages.prompts, stages.train, stages.evaluate, stages.register):
        monkeypatch.setattr(task, "retry_delay_seconds", 0)
    return tmp_path


@pytest.mark.slow
def test_second_flow_runs_registration_only(prefect_server, pipeline):
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", "train", "evaluate", "register"]
    assert train_policy(promote=False) == {"name": "stub", "version": 7, "alias": "challenger"}
    assert calls(pipeline) == ["register"]


@pytest.mark.slow
def test_failing_stage_fails_the_flow_with_its_own_error(prefect_server, pipeline):
    (pipeline / "fail_train").write_text("1")
    # Python prints the argument of SystemExit, and ends with status 1.
    with pytest.raises(SystemExit, match="stage train failed with exit status 1") as failure:
        main()
    assert calls(pipeline) == ["prompts", "train", "train", "train"]
    assert "PolicyError: the stub was told to fail" in str(failure.value)


@pytest.mark.slow
def test_wrong_parameters_are_not_retried(prefect_server, pipeline):
    (pipeline / "fail_prompts").write_text("2")
    with pytest.raises(StageError, match="PolicyError: the stub was told to fail"):
        train_policy(promote=False)
    assert calls(pipeline) == ["prompts"]


@pytest.mark.slow
def test_preempted_training_goes_on_without_using_up_its_retries(prefect_server, pipeline, monkeypatch):
    monkeypatch.setattr(stages, "RETRY_DELAY_S", 0)
    (pipeline / "preempt_train").write_text("4")
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", *["train"] * 5, "evaluate", "register"]


@pytest.mark.slow
def test_crashed_training_resumes_on_retry(prefect_server, pipeline):
    (pipeline / "crash_once").touch()
    train_policy(promote=False)
    assert calls(pipeline) == ["prompts", "train", "train", "evaluate", "register"]
    log = (pipeline / "logs/train.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("update")] == [
        "update 2 starting from 2",
        "update 3 starting from 2",
    ]


def test_flow_refuses_to_run_inside_a_stage(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(RuntimeError, match="DVC stage train started the flow"):
        refuse_inside_stage()


def test_flow_starts_outside_a_stage(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    refuse_inside_stage()
    assert "DVC_STAGE" not in os.environ
