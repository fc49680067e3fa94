"""Stores for tests of the registry: versions without files, and a real MLflow server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient

START_S = 180.0

QUIET_MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Jobs take eight processes of MLflow, for judges of generated text, which are not used here."""


def make_versions(client: MlflowClient, name: str, count: int) -> None:
    """Registers versions that hold nothing, for tests of what points to them."""
    run = client.create_run("0")
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, run.info.artifact_uri, run_id=run.info.run_id)


def copy_database(source: Path, target: Path) -> None:
    """Copy a store, which is faster than making one."""
    with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a started server answers."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.5)


@contextlib.contextmanager
def mlflow_server(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start a tracking server and registry with a database and artifacts in `folder`; return its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", (folder / "served").as_uri()]
    with (folder / "mlflow-server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **QUIET_MLFLOW, **(settings or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for_answer(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
