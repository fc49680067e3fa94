"""Retention on real stores: state is removed some days after its run finished, everything else stays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.errors import TrackingError
from sfgrpo.paths import run_lock
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.storage.retention import remove_finished
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking.mlflow_client import KEY_TAG, connect
from tests.support.s3 import BUCKET, S3Server

# Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DAY_MS = 24 * 3600 * 1000


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with a run of every status and age."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    client = connect(uri)
    for key, endings in {
        "old": [("FINISHED", 30)],
        "young": [("FINISHED", 1)],
        "failed": [("FAILED", 30)],
        "killed": [("KILLED", 30)],
        "running": [("RUNNING", 30)],
        "twice": [("FINISHED", 30), ("RUNNING", 30)],
    }.items():
        for status, days in endings:
            run = client.create_run("0", tags={KEY_TAG: digits(key) + "rest of the key"})
            if status != "RUNNING":
                client.set_terminated(run.info.run_id, status, int(time.time() * 1000 - days * DAY_MS))
    return uri


def digits(name: str) -> str:
    return f"{name:0<16}"


def environment(uri: str, scratch: Path, mirror: str | None = None) -> Environment:
    values = {"MLFLOW_TRACKING_URI": uri, "SFGRPO_SCRATCH": scratch}
    return Environment(**values, **({} if mirror is None else {"SFGRPO_MIRROR": mirror}))


def make_states(scratch: Path) -> None:
    for name in ("old", "young", "failed", "killed", "running", "twice", "unknown"):
        folder = scratch / f"train-{digits(name)}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints/state").write_bytes(bytes(1000))
    (scratch / "pretrain-0123").mkdir()


def names(folder: Path) -> set[str]:
    return {path.name.removeprefix("train-").rstrip("0") for path in folder.glob("train-*")}


def test_only_state_that_is_finished_for_long_is_removed(uri, tmp_path):
    make_states(tmp_path)
    done = remove_finished(environment(uri, tmp_path), days=14, rehearsal=False)
    assert [(removed.name, removed.num_bytes) for removed in done.removed] == [(f"train-{digits('old')}", 1000)]
    assert names(tmp_path) == {"young", "failed", "killed", "running", "twice", "unknown"}
    assert len(done.kept) == 6
    assert (tmp_path / "pretrain-0123").exists()


def test_a_rehearsal_removes_nothing(uri, tmp_path):
    make_states(tmp_path)
    done = remove_finished(environment(uri, tmp_path), days=14, rehearsal=True)
    assert [removed.name for removed in done.removed] == [f"train-{digits('old')}"]
    assert "old" in names(tmp_path)


def test_state_that_somebody_trains_on_stays(uri, tmp_path):
    make_states(tmp_path)
    with exclusive_lock(run_lock(tmp_path / f"train-{digits('old')}")) as alone:
        assert alone
        assert remove_finished(environment(uri, tmp_path), days=14, rehearsal=False).removed == []
    assert "old" in names(tmp_path)


def test_objects_of_finished_runs_leave_the_bucket(uri, tmp_path, s3_server: S3Server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    mirror = f"s3://{BUCKET}/retention"
    for name in ("old", "young", "unknown"):
        bucket = Bucket(f"{mirror}/train-{digits(name)}")
        for key in ("checkpoints/update-000001/manifest.json", "checkpoints/update-000001/state"):
            (tmp_path / "file").write_bytes(bytes(10))
            with (tmp_path / "file").open("rb") as file:
                bucket.put(key, file)
    settings = environment(uri, tmp_path, mirror)
    rehearsed = remove_finished(settings, days=14, rehearsal=True)
    assert len(Bucket(mirror).folders()) == 3
    done = remove_finished(settings, days=14, rehearsal=False)
    assert done.removed == rehearsed.removed
    assert [(removed.place, removed.num_bytes) for removed in done.removed] == [(f"{mirror}/train-{digits('old')}", 20)]
    assert {name.removeprefix("train-").rstrip("0") for name in Bucket(mirror).folders()} == {"young", "unknown"}


def test_branches_of_versions_with_an_alias_are_in_use(uri, tmp_path):
    client = connect(uri)
    client.create_registered_model("model")
    for branch in ("runs/first", "runs/second", None):
        version = client.create_model_version(
            "model", "/nowhere", tags={} if branch is None else {"run_branch": branch}
        )
        if branch != "runs/first":
            client.set_registered_model_alias("model", f"alias{version.version}", version.version)
    assert remove_finished(environment(uri, tmp_path), days=14, rehearsal=True).branches == ["runs/second"]


def test_command_prints_and_writes_what_it_removed(uri, tmp_path, monkeypatch, capsys):
    make_states(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("SFGRPO_SCRATCH", str(tmp_path))
    report = tmp_path / "report.json"
    assert main(["retention", "--days", "14", "--rehearse", "--report", str(report)]) == 0
    assert capsys.readouterr().out.endswith("would remove 1 places, 0.0 MB in all\n")
    assert main(["retention", "--days", "14", "--report", str(report)]) == 0
    assert f"removed {tmp_path}/train-{digits('old')}: 0.0 MB\n" in capsys.readouterr().out
    assert [removed["num_bytes"] for removed in json.loads(report.read_text())["removed"]] == [1000]


def test_without_mlflow_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make_states(tmp_path)
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 does not answer .* nothing was removed"):
        remove_finished(environment("http://127.0.0.1:9", tmp_path), days=0, rehearsal=False)
    assert "old" in names(tmp_path)
