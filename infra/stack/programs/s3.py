"""The S3 server of `infra/s3_server`, with a bucket for each kind of file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import Folder
from infra.stack.program import ROOT, Launch, Program, Stack
from infra.stack.settings import LOOPBACK

PYTHON = ROOT / ".venv-s3" / "bin" / "python"
SERVER = ROOT / "infra" / "s3_server" / "serve.py"
ACCESS_KEY = "sfgrpo:stack"
BUCKETS = {"runs": True, "dvc": True, "mlflow": False}
"""The buckets, and whether they keep old versions."""


def client_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of S3 clients."""
    return {
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{stack.settings.s3_port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": stack.secrets.s3_secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _require(folder: Folder) -> None:
    if not PYTHON.exists():
        raise StackError(f"{PYTHON}, the Python of the local S3 server, is missing; run `make s3-server`")


def _launch(stack: Stack) -> Launch:
    folder = stack.folder.make_data("s3")
    port = str(stack.settings.s3_port)
    arguments = ["--folder", str(folder), "--port", port, "--access-key", ACCESS_KEY]
    return Launch(
        command=[str(PYTHON), str(SERVER), *arguments],
        environment={"AWS_SECRET_ACCESS_KEY": stack.secrets.s3_secret_key},
        working_directory=folder,
    )


def _client(stack: Stack) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, connect_timeout=5.0, read_timeout=5.0)
    keys = client_environment(stack)
    return boto3.session.Session().client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
        config=config,
    )


@contextlib.contextmanager
def _s3_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise UnhealthyError(f"it does not answer as it should ({type(error).__name__})") from error


def _check(stack: Stack) -> None:
    with _s3_errors():
        _client(stack).list_buckets()


def _initialise(stack: Stack) -> None:
    with _s3_errors():
        client = _client(stack)
        existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for name, is_versioned in BUCKETS.items():
            if name not in existing:
                client.create_bucket(Bucket=name)
            if is_versioned:
                client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})


S3 = Program(
    name="s3",
    launch=_launch,
    check=_check,
    address=lambda stack: client_environment(stack)["AWS_ENDPOINT_URL"],
    require=_require,
    initialise=_initialise,
    port="STACK_S3_PORT",
    stop_timeout_s=60,
)
