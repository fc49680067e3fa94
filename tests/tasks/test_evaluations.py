"""Evaluations as Prefect tasks beside a stub of a training: awaited, done in the background, shown."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterName,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)

from sfgrpo.evaluation.store import EVALUATIONS
from sfgrpo.paths import TRAINING
from tasks import evaluations, stages
from tasks.evaluations import background_evaluations, report
from tasks.stages import run_command, train
from tests.support.paths import ROOT
from tests.support.published import keep, publish
from tests.support.stub_pipeline import build_stub_pipeline, calls

# Not ours to mend: Prefect's own deprecations and unclosed sockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

KEEPING = """
import json, pathlib, sys
sys.path.insert(0, {root!r})
from tests.support.published import keep, publish
run = pathlib.Path(".scratch/train-1").resolve()
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path("reports/training.json").write_text(json.dumps({{"folder": str(run)}}))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluations, "POLL_S", 0.1)
    monkeypatch.setattr(evaluations.evaluate_update, "retry_delay_seconds", 0)
    monkeypatch.delenv("SFGRPO_EVALUATION_DEVICE", raising=False)
    (tmp_path / "reports").mkdir()
    return tmp_path


def started(here: Path) -> Path:
    """Make the folder of a training that runs here."""
    run = here / ".scratch/train-1"
    run.mkdir(parents=True, exist_ok=True)
    TRAINING.write_text(json.dumps({"folder": str(run)}))
    return run


def shown(flow_run_name: str) -> tuple[dict[str, str], list[str]]:
    """Return the states of a flow run's tasks by name, and its Markdown artifacts, oldest first."""
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name])))
        tasks: list[Any] = []
        deadline = time.monotonic() + 20
        while not tasks or any(not each.state.is_final() for each in tasks):
            assert time.monotonic() < deadline, "the tasks do not end"
            time.sleep(0.5)
            tasks = client.read_task_runs(
                task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id]))
            )
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    artifacts = sorted(artifacts, key=lambda artifact: artifact.created)
    tables = [str(artifact.data) for artifact in artifacts if artifact.type == "markdown"]
    return {each.name: each.state.type.value for each in tasks}, tables


@pytest.mark.slow
def test_snapshots_are_awaited_and_shown_in_order_while_the_block_runs(prefect_server, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:5000")

    @flow(flow_run_name="awaited")
    def body() -> None:
        with background_evaluations():
            run = started(here)
            for update in (0, 2):
                publish(run, update)
                time.sleep(1.0)
                keep(run, update, **{"geneval/overall": 0.5 + update / 100})

    body()
    tasks, artifacts = shown("awaited")
    assert tasks == {"evaluate update 0": "COMPLETED", "evaluate update 2": "COMPLETED"}
    assert "| 0 | 0.500 ± 0.050 | 0.5000 |" in artifacts[0] and "| 2 |" not in artifacts[0]
    assert "| 0 | 0.500 ± 0.050 | 0.5000 |\n| 2 | 0.520 ± 0.050 | 0.5000 |" in artifacts[1]
    assert "(http://127.0.0.1:5000/#/runs/0123)" in artifacts[1] and "secret" not in artifacts[1]
    assert "samples_000002.png" in artifacts[1]


@pytest.mark.slow
def test_what_an_earlier_flow_saw_evaluated_is_not_shown_again(prefect_server, here):
    run = started(here)
    publish(run, 0)
    keep(run, 0)
    publish(run, 2)
    time.sleep(0.1)

    @flow(flow_run_name="resumed")
    def body() -> None:
        with background_evaluations():
            started(here)
            time.sleep(1.0)
            keep(run, 2)

    body()
    assert set(shown("resumed")[0]) == {"evaluate update 2"}


@pytest.mark.slow
def test_with_a_device_the_command_evaluates_there_and_a_failure_is_retried_and_left_to_the_training(
    prefect_server, here, monkeypatch
):
    build_stub_pipeline(here)
    monkeypatch.setenv("SFGRPO_EVALUATION_DEVICE", "cpu")
    root = str(ROOT)
    preamble = KEEPING.format(root=root)
    (here / "extra_evaluate-snapshot.py").write_text(
        "import os\nassert os.environ['SFGRPO_DEVICE'] == 'cpu'\n"
        + preamble
        + "if sys.argv[3] == '0':\n    sys.exit(1)\nkeep(pathlib.Path(sys.argv[2]), int(sys.argv[3]))\nsys.exit(0)\n"
    )

    @flow(flow_run_name="background")
    def body() -> None:
        with background_evaluations():
            run = started(here)
            publish(run, 0)
            publish(run, 2)
            deadline = time.monotonic() + 60
            while not list((run.parent / EVALUATIONS).glob("*/metrics.json")):
                assert time.monotonic() < deadline, (here / "logs/evaluate-update-2.log").read_text()
                time.sleep(0.1)

    body()
    tasks, artifacts = shown("background")
    assert tasks == {"evaluate update 0": "FAILED", "evaluate update 2": "COMPLETED"}
    assert calls(here) == ["evaluate-snapshot"] * 4
    assert len(artifacts) == 1 and "| 2 | 0.250 ± 0.050 | 0.5000 |" in artifacts[0]


@pytest.mark.slow
def test_failing_training_is_neither_hidden_nor_delayed(prefect_server, here):
    @flow(flow_run_name="failing")
    def body() -> None:
        with background_evaluations():
            publish(started(here), 0)
            time.sleep(1.0)
            raise ValueError("the training failed")

    begin = time.monotonic()
    with pytest.raises(ValueError, match="the training failed"):
        body()
    assert time.monotonic() - begin < 20
    assert shown("failing")[1] == []


@pytest.mark.slow
def test_unreadable_record_stops_the_showing_and_not_the_flow(prefect_server, here, caplog):
    @flow(flow_run_name="unreadable")
    def body() -> int:
        with background_evaluations():
            TRAINING.write_text("nonsense")
            time.sleep(1.0)
        return 5

    assert body() == 5
    assert "the evaluations are no longer shown; the training goes on" in caplog.text


@pytest.mark.slow
def test_pipeline_shows_the_evaluations_of_its_training(prefect_server, here):
    build_stub_pipeline(here)
    (here / "extra_train.py").write_text(
        "import time\n" + KEEPING.format(root=str(ROOT)) + "publish(run, 0)\nkeep(run, 0)\n"
    )

    @flow(flow_run_name="pipeline")
    def body() -> None:
        stages.prompts()
        with background_evaluations():
            train()

    body()
    assert shown("pipeline")[0]["evaluate update 0"] == "COMPLETED"


def test_command_ends_once_it_is_told_to_stop(here, monkeypatch):
    from prefect.logging import disable_run_logger

    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begin = time.monotonic()
    with disable_run_logger(), pytest.raises(stages.StageError, match="stage wait failed with exit status 143"):
        run_command("wait", ["python", "-c", "import time; time.sleep(60)"], stop=stop)
    assert time.monotonic() - begin < 20


def test_report_names_the_run_without_an_address_of_its_page(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@db/mlflow")
    run = started(here)
    publish(run, 0)
    text = report(run, 0)
    assert "MLflow run `0123`" in text and "secret" not in text
    assert text.startswith("| Update |\n| ---: |\n\n")
