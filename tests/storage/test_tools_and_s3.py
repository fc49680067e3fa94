"""DVC and MLflow with the S3 server behind a faulty network: what they push comes back as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.store.artifact import s3_artifact_repo

from sfgrpo.tracking.mlflow_client import connect
from tests.support.faulty_proxy import FaultyProxy
from tests.support.s3 import BUCKET, S3Server

pytestmark = [
    pytest.mark.slow,
    # Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

MODES = ("status", "cut_request", "cut_answer", "slow")
BIG = 12 * 2**20


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    # Every attempt of MLflow's and DVC's clients counts here, as it does for the mirror.
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    proxy.slow_s, proxy.every = 0.2, 4
    yield proxy
    proxy.close()


def dvc(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / "site")}
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mode", MODES)
def test_what_dvc_pushes_comes_back_through_a_faulty_network(proxy, tmp_path, mode):
    folder, data = tmp_path / "repository", tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    files = {f"{index}.bin": os.urandom(1000) for index in range(6)} | {"big.bin": os.urandom(BIG)}
    for name, content in files.items():
        (data / name).write_bytes(content)
    dvc(folder, "init", "--no-scm")
    dvc(folder, "remote", "add", "--default", "store", f"s3://{BUCKET}/dvc-{mode}")
    dvc(folder, "add", "data")
    proxy.mode = mode
    dvc(folder, "push")
    shutil.rmtree(data)
    shutil.rmtree(folder / ".dvc" / "cache")
    dvc(folder, "pull")
    assert {path.name: path.read_bytes() for path in data.iterdir()} == files
    assert proxy.num_faults


@pytest.mark.parametrize("mode", MODES)
def test_artifacts_of_mlflow_come_back_through_a_faulty_network(proxy, tmp_path, mode):
    (tmp_path / "sent").mkdir()
    files = {"small.json": b"{}", "big.bin": os.urandom(BIG)}
    for name, content in files.items():
        (tmp_path / "sent" / name).write_bytes(content)
    s3_artifact_repo._cached_get_s3_client.cache_clear()  # it would go to the server of the test before
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("faults", artifact_location=f"s3://{BUCKET}/mlflow-{mode}")
    run = client.create_run(experiment).info.run_id
    proxy.every, proxy.mode = 2, mode
    client.log_artifacts(run, str(tmp_path / "sent"))
    (tmp_path / "came").mkdir()
    came = Path(client.download_artifacts(run, "", str(tmp_path / "came")))
    assert {path.name: path.read_bytes() for path in came.iterdir()} == files
    assert proxy.num_faults
