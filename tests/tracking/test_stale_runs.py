"""Stale runs of a real MLflow store: dead ones are closed; live ones and those of other machines are left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.errors import TrackingError
from sfgrpo.runtime.environment import Environment
from sfgrpo.tracking import mlflow_client, stale_runs
from sfgrpo.tracking.mlflow_client import KEY_TAG, OWNER_HOST_TAG, OWNER_PROCESS_TAG, connect, owner_tags
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
from sfgrpo.tracking.stale_runs import CLOSED_BY_TAG, close_stale_runs

# Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TRAINING = """
import sys, time
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(uri=sys.argv[1], experiment="stale", run_name="killed", key=sys.argv[2])
tracker.log_metrics({"reward": 0.5}, 1)
tracker.open()
print("open", flush=True)
time.sleep(120)
"""
HOUR_S = 3600


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the HTTP settings of the command from the tests of other modules."""
    for name, value in stale_runs.HTTP_SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """A store of its own for every test, because the command looks at all runs; its tables are copied."""
    for file in database.parent.glob("mlflow.db*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def environment(uri: str) -> Environment:
    return Environment(MLFLOW_TRACKING_URI=uri)


def killed_run(uri: str, key: str = "work") -> str:
    """Record a run in a process that is killed midway; return the run's id."""
    process = subprocess.Popen([sys.executable, "-c", TRAINING, uri, key], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    client = connect(uri)
    experiment = client.get_experiment_by_name("stale")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
    assert run.info.status == "RUNNING"
    return run.info.run_id


def foreign_run(uri: str, tags: dict[str, str], hours_ago: float) -> str:
    client = connect(uri)
    start_ms = int((time.time() - hours_ago * HOUR_S) * 1000)
    run = client.create_run("0", start_time=start_ms, run_name="foreign", tags={KEY_TAG: "elsewhere", **tags})
    return run.info.run_id


def test_run_of_a_killed_process_is_closed_and_says_by_whom(uri):
    run_id = killed_run(uri)
    found = close_stale_runs(environment(uri), HOUR_S)
    assert [run.run_id for run in found.closed] == [run_id]
    run = connect(uri).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.end_time is not None
    assert "close-stale-runs on" in run.data.tags[CLOSED_BY_TAG] and "is gone" in run.data.tags[CLOSED_BY_TAG]


def test_closed_run_is_reopened_by_its_key_and_is_not_closed_again_while_it_runs(uri):
    run_id = killed_run(uri)
    close_stale_runs(environment(uri), HOUR_S)
    resumed = MlflowTracker(uri=uri, experiment="stale", key="work")
    resumed.open()
    assert resumed.run_id == run_id
    assert connect(uri).get_run(run_id).info.status == "RUNNING"
    found = close_stale_runs(environment(uri), HOUR_S)
    assert ([run.run_id for run in found.at_work], found.closed) == ([run_id], [])
    resumed.finish("FINISHED")
    assert connect(uri).get_run(run_id).info.status == "FINISHED"


def test_run_that_is_resumed_meanwhile_stays_open(uri, monkeypatch):
    run_id = killed_run(uri)
    client = connect(uri)
    ended = client.set_terminated

    def resumed_meanwhile(run_id: str, status: str) -> None:
        for name, value in owner_tags().items():
            client.set_tag(run_id, name, value)
        ended(run_id, status)

    monkeypatch.setattr(client, "set_terminated", resumed_meanwhile)
    monkeypatch.setattr(mlflow_client, "connect", lambda uri: client)
    assert close_stale_runs(environment(uri), HOUR_S).closed == []
    assert client.get_run(run_id).info.status == "RUNNING"


def test_run_that_ended_meanwhile_keeps_its_status(uri):
    client = connect(uri)
    before = client.get_run(killed_run(uri))
    client.set_terminated(before.info.run_id, "FINISHED")
    assert not stale_runs._close(client, before)
    assert client.get_run(before.info.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("tags", [{}, {OWNER_HOST_TAG: "node-b", OWNER_PROCESS_TAG: "1 2 boot 3"}])
def test_silent_runs_of_others_are_listed_and_left_open(uri, tags):
    old, young = foreign_run(uri, tags, hours_ago=3), foreign_run(uri, tags, hours_ago=0.1)
    found = close_stale_runs(environment(uri), HOUR_S)
    assert [run.run_id for run in found.silent] == [old]
    assert found.silent[0].silent_s == pytest.approx(3 * HOUR_S, abs=60)
    assert [run.run_id for run in found.at_work] == [young]
    assert connect(uri).get_run(old).info.status == "RUNNING"


def test_a_late_record_counts_and_not_the_start(uri):
    run_id = foreign_run(uri, {}, hours_ago=3)
    connect(uri).log_metric(run_id, "reward", 0.5)
    assert [run.run_id for run in close_stale_runs(environment(uri), HOUR_S).at_work] == [run_id]


def test_runs_of_other_projects_are_ignored(uri):
    connect(uri).create_run("0", start_time=0)
    found = close_stale_runs(environment(uri), HOUR_S)
    assert (found.at_work, found.closed, found.silent) == ([], [], [])


def test_runs_of_all_pages_are_found(uri, monkeypatch):
    monkeypatch.setattr(mlflow_client, "PAGE_SIZE", 2)
    for _ in range(5):
        foreign_run(uri, {}, hours_ago=3)
    assert len(close_stale_runs(environment(uri), HOUR_S).silent) == 5


def test_command_prints_and_writes_what_it_found(uri, tmp_path, monkeypatch, capsys):
    run_id = killed_run(uri)
    foreign_run(uri, {}, hours_ago=3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["close-stale-runs", "--report", str(tmp_path / "reports/runs.json")]) == 0
    output = capsys.readouterr().out
    assert "closed killed: process" in output
    assert "silent foreign: no record for 3.0 h from unknown" in output
    assert output.endswith("runs at work 0, closed 1, silent 1\n")
    report = json.loads((tmp_path / "reports/runs.json").read_text())
    assert report["closed"][0]["run_id"] == run_id


def test_unreachable_store_is_an_error_in_one_sentence(monkeypatch):
    monkeypatch.setitem(stale_runs.HTTP_SETTINGS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in stale_runs.HTTP_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        TrackingError, match=r"MLFLOW_TRACKING_URI http://127\.0\.0\.1:9 does not answer .* run this command again"
    ):
        close_stale_runs(environment("http://127.0.0.1:9"), HOUR_S)
    for name in stale_runs.HTTP_SETTINGS:
        os.environ.pop(name)
