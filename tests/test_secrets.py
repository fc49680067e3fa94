"""No credential is left anywhere: first that the search finds what is planted, then that a run leaves nothing."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.types import TAGS
from tests.support.s3 import S3Server
from tests.support.secrets_search import in_bucket, in_bytes, in_command_lines, in_folder, in_sqlite, in_text
from tests.support.stores import QUIET_MLFLOW
from tests.support.tiny_run import ROOT, write_params

SECRET = "planted/secret+with=signs%and more"
SECRETS = {"KEY": SECRET}
NAMES = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING", "WEBHOOK_SECRET")
START_TIMEOUT_S = 180.0
SMALL: Mapping[str, Any] = {
    "prompts.num_train": 16,
    "prompts.num_validation": dict.fromkeys(TAGS, 1),
    "prompts.num_evaluation": dict.fromkeys(TAGS, 1),
    "sampling.num_steps": 2,
    "rollout.prompts_per_update": 2,
    "rollout.group_size": 2,
    "rollout.micro_batch_size": 4,
    # It differs from image to image, so that there is something to learn and to register.
    "reward.name": "likeness",
    "update.num_updates": 1,
    "update.steps_per_update": 1,
    "update.trained_steps": None,
    "update.micro_batch_size": 4,
    "checkpoint.every_num_updates": 1,
    "evaluation.num_steps": 1,
    "evaluation.images_per_prompt": 1,
    "evaluation.every_num_updates": 1,
}


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("after", ["", "z", "yz", "xyz"])
def test_base64_is_found_wherever_the_secret_stands(before, after):
    text = f"{before}{SECRET}{after}".encode()
    assert in_bytes(base64.b64encode(text), SECRETS) == {"KEY"}
    assert in_bytes(base64.urlsafe_b64encode(text), SECRETS) == {"KEY"}


@pytest.mark.parametrize(
    "text", [SECRET, urllib.parse.quote(SECRET, safe=""), urllib.parse.quote_plus(SECRET), SECRET.encode().hex()]
)
def test_every_form_is_found(text):
    assert in_bytes(f"x{text}y".encode(), SECRETS) == {"KEY"}


def test_other_text_is_not_found():
    assert not in_bytes(b"planted/secret+with=signs%and les" * 100, SECRETS)


def test_short_secret_is_refused():
    with pytest.raises(ValueError, match="a secret of 3 characters would be found by chance; take 8 or more"):
        in_bytes(b"", {"KEY": "abc"})


def test_files_names_and_packed_content_are_searched(tmp_path):
    plain = {"KEY": "planted-secret-0123"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_text(f"x {plain['KEY']} y")
    (tmp_path / "clean").write_text("nothing")
    (tmp_path / "allowed").write_text(plain["KEY"])
    (tmp_path / f"of-{plain['KEY']}").touch()
    (tmp_path / "packed.gz").write_bytes(gzip.compress(plain["KEY"].encode()))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("inside", plain["KEY"] * 3)
    found = in_folder(tmp_path, plain, but=["allowed"])
    assert [line.partition(": ")[0].removeprefix(f"{tmp_path}/") for line in found] == [
        "a/log",
        f"of-{plain['KEY']}",
        "packed.gz (unpacked)",
        "packed.zip (inside)",
    ]


def test_database_is_searched(tmp_path):
    with sqlite3.connect(tmp_path / "data.db") as connection:
        connection.execute("CREATE TABLE tags (name TEXT, value TEXT)")
        connection.execute("INSERT INTO tags VALUES (?, ?)", ("x", SECRET))
        connection.execute("INSERT INTO tags VALUES (?, ?)", ("y", "z"))
    connection.close()
    assert in_sqlite(tmp_path / "data.db", SECRETS) == [f"{tmp_path}/data.db: KEY in tags.value"]
    assert in_folder(tmp_path, SECRETS)


def test_dump_is_searched_without_showing_what_is_found():
    assert in_text("dump", f"one\nINSERT {SECRET}\nthree", SECRETS) == ["dump, line 2: KEY"]


def test_command_lines_are_searched():
    process = subprocess.Popen([sys.executable, "-c", "input()", SECRET], stdin=subprocess.PIPE)
    try:
        assert in_command_lines(SECRETS) == [f"process {process.pid}: KEY"]
    finally:
        process.communicate(b"\n")


def test_objects_are_searched(s3_server):
    client, bucket = s3_server.client(), "searched"
    plain = {"KEY": "planted-secret-0123"}
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="clean", Body=b"nothing")
    client.put_object(Bucket=bucket, Key="content", Body=plain["KEY"].encode())
    client.put_object(Bucket=bucket, Key="meta", Body=b"", Metadata={"a": plain["KEY"]})
    client.put_object(Bucket=bucket, Key=plain["KEY"], Body=b"")
    found = in_bucket(client, bucket, plain)
    assert {line.rpartition(" ")[2] for line in found} == {"content", "metadata", "key"} and len(found) == 3


@pytest.fixture
def services(tmp_path: Path, s3_server: S3Server) -> Iterator[dict[str, str]]:
    """An MLflow server with its artifacts in S3; yields the environment of its clients, full of secrets."""
    s3_server.client().create_bucket(Bucket="secrets")
    folder = tmp_path / "mlflow"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    password = secrets.token_hex(20)
    environment = {
        **os.environ,
        **s3_server.environment,
        **QUIET_MLFLOW,
        # In the address as well, from where it must not reach the records.
        "MLFLOW_TRACKING_URI": f"http://tests:{password}@127.0.0.1:{port}",
        "MLFLOW_TRACKING_USERNAME": "tests",
        "MLFLOW_TRACKING_PASSWORD": password,
        "PREFECT_API_AUTH_STRING": f"admin:{secrets.token_hex(20)}",
        "WEBHOOK_SECRET": secrets.token_hex(20),
        "AWS_SESSION_TOKEN": "",
        "SFGRPO_MIRROR": "s3://secrets/train",
        "SFGRPO_DEVICE": "cpu",
        "SFGRPO_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", "s3://secrets/mlflow"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


WRONG = "a-wrong-secret-0123456789"
FAILURES: Mapping[str, Mapping[str, str]] = {
    "signature": {"AWS_SECRET_ACCESS_KEY": WRONG},
    "header": {"AWS_SESSION_TOKEN": f"{WRONG}\n"},
    "endpoint": {"AWS_ENDPOINT_URL": f"http://user:{WRONG}@127.0.0.1:1", "MLFLOW_TRACKING_URI": "sqlite:///x.db"},
    "mirror": {"SFGRPO_MIRROR": f"s3://user:{WRONG}@runs/x"},
    "store": {"MLFLOW_TRACKING_URI": f"http://user:{WRONG}@127.0.0.1:1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
}
"""Variables with which a training cannot start, by what fails."""


@pytest.mark.slow
def test_run_leaves_no_secret_anywhere_though_it_fails_in_every_way(tmp_path, s3_server, services):
    looked_for = {name: services[name].rpartition(":")[2] for name in NAMES} | {"the wrong secret": WRONG}
    seen: list[str] = []

    def start(name: str, *arguments: str, **changes: str) -> subprocess.Popen[bytes]:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(ROOT / "models/shapes-base", folder / "models/shapes-base")
            write_params(folder, SMALL)
            if name in FAILURES:
                shutil.copytree(tmp_path / "work/data", folder / "data")
        command = [sys.executable, "-m", "sfgrpo", *arguments]
        with (folder / f"{arguments[0]}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=folder, env=services | changes, stdout=log, stderr=log)

    def wait(processes: Iterable[subprocess.Popen[bytes]]) -> list[int]:
        while any(process.poll() is None for process in processes):
            seen.extend(in_command_lines(looked_for))
            time.sleep(0.5)
        return [process.returncode for process in processes]

    assert wait([start("work", "prompts")]) == [0]
    # They mostly wait for answers that do not come, so they go side by side with the training.
    failing = [start(name, "train", **changes) for name, changes in FAILURES.items()]
    for stage in ("train", "evaluate", "register"):
        assert wait([start("work", stage)]) == [0], (tmp_path / f"work/{stage}.log").read_text()
    assert set(wait(failing)) <= {1, 2}
    assert "SignatureDoesNotMatch" in (tmp_path / "signature/train.log").read_text()
    assert not seen
    for name in ("work", "mlflow", *FAILURES):
        assert in_folder(tmp_path / name, looked_for) == []
    assert in_bucket(s3_server.client(), "secrets", looked_for) == []
    assert {"train", "mlflow"} <= set(top_level(s3_server))
    record = json.loads((tmp_path / "work/models/policy/training.json").read_text())
    assert record["tracking_uri"] == services["MLFLOW_TRACKING_URI"].replace(f"tests:{looked_for[NAMES[1]]}@", "")


def top_level(server: S3Server) -> list[str]:
    entries = server.client().list_objects_v2(Bucket="secrets", Delimiter="/")["CommonPrefixes"]
    return [entry["Prefix"].rstrip("/") for entry in entries]


def test_log_and_traceback_are_without_secrets(tmp_path):
    program = (
        "import logging, os, sys; from sfgrpo.runtime.entry_point import set_up_logging; set_up_logging()\n"
        "secret = os.environ['MLFLOW_TRACKING_PASSWORD']\n"
        "try: raise ValueError(f'caught with {secret}')\n"
        "except ValueError: logging.getLogger('x').exception('http://user:some-password@host %s', secret)\n"
        "raise RuntimeError(f'uncaught with {secret}')\n"
    )
    environment = os.environ | {"MLFLOW_TRACKING_PASSWORD": SECRET}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "RuntimeError: uncaught with ***" in run.stderr and "ValueError: caught with ***" in run.stderr
    assert "ERROR x: http://***@host ***" in run.stderr
    assert SECRET not in run.stderr and "some-password" not in run.stderr
