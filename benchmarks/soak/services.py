"""Real MLflow and S3 servers, which can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.soak.training import ROOT, SoakError, environment_of
from sfgrpo.tracking.mlflow_client import connect

START_S = 120.0
BUCKET = "soak"
S3_PYTHON = ROOT / ".venv-s3/bin/python"


class Service:
    """A server on a fixed port of this machine."""

    def __init__(
        self, name: str, folder: Path, port: int, health: str, command: Sequence[str], more: Mapping[str, str]
    ) -> None:
        self.name, self.uri, self.up = name, f"http://127.0.0.1:{port}", False
        self._log, self._health, self._command = folder / "log", f"{self.uri}/{health}", command
        self._environment = environment_of(folder, more)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SoakError(f"{self.name} does not answer; see {self._log}")
            time.sleep(0.2)
        self.up = True

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        self.up = False
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self._health, timeout=5):
                return True
        except OSError:
            return False


def mlflow_server(folder: Path) -> Service:
    """Prepare MLflow on a SQLite database, with its artifacts in a folder."""
    folder.mkdir()
    database, port = f"sqlite:///{folder}/mlflow.db", _free_port()
    connect(database).search_experiments()
    stores = ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Service("MLflow", folder, port, "health", command, quiet)


def s3_server(folder: Path) -> tuple[Service, dict[str, str]]:
    """Prepare the local S3 server; also return the environment variables that its clients need."""
    if not S3_PYTHON.exists():
        raise SoakError(f"{S3_PYTHON} is missing, the Python of the local S3 server; run `make s3-server`")
    folder.mkdir()
    port = _free_port()
    keys = {"AWS_ACCESS_KEY_ID": "sfgrpo:soak", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    program = str(ROOT / "infra/s3_server/serve.py")
    command = [str(S3_PYTHON), program, "--folder", str(folder / "data"), "--port", str(port)]
    service = Service("S3", folder, port, "healthcheck", command, keys)
    return service, keys | {"AWS_ENDPOINT_URL": service.uri, "AWS_DEFAULT_REGION": "us-east-1"}


def make_bucket() -> str:
    """Create the bucket on the server that the environment names, and return the address for `SFGRPO_MIRROR`."""
    import boto3

    boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/trainings"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
