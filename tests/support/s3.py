"""The local S3 server of `infra/s3_server`, for tests that kill and restart it."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

PYTHON = ROOT / ".venv-s3" / "bin" / "python"
PROGRAM = ROOT / "infra" / "s3_server" / "serve.py"
BUCKET = "runs"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class S3Server:
    """A server with its data in a folder, the same port and the same keys at each start; a context that runs it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.access_key = "sfgrpo:tests"
        self.secret_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables by which every S3 client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """Make a boto3 client of this server, independent of the environment."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )

    def start(self) -> None:
        """Start the server, with the data of the last run, and wait until it answers."""
        assert self._process is None, "the server runs already"
        if not PYTHON.exists():
            raise FileNotFoundError(f"{PYTHON} is missing, the Python of the local S3 server; run `make s3-server`")
        arguments = ["--folder", self._folder / "data", "--port", self.port, "--access-key", self.access_key]
        environment = {"AWS_SECRET_ACCESS_KEY": self.secret_key}
        command = [str(part) for part in (PYTHON, PROGRAM, *arguments)]
        log = self._folder / "server.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"ready: " not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the local S3 server did not start: {log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End the server like a crash of the machine; do nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Shut the server down; do nothing if it does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            finally:
                self.kill()
