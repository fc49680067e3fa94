"""The passwords and keys of a stack: generated once, and kept in a file that only its owner can read."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfgrpo.runtime.files import atomic_write


def _password() -> str:
    return secrets.token_hex(20)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def _generated(generate: Callable[[], str]) -> Any:
    return dataclasses.field(default_factory=generate, repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """All secrets of a stack; `repr` shows none of them."""

    postgres_password: str = _generated(_password)
    """Password of PostgreSQL's superuser."""
    prefect_database_password: str = _generated(_password)
    mlflow_database_password: str = _generated(_password)
    s3_secret_key: str = _generated(_password)
    prefect_password: str = _generated(_password)
    """Password for Prefect, where it asks for one."""
    mlflow_password: str = _generated(_password)
    """Password for MLflow, where it asks for one."""
    mlflow_session_key: str = _generated(_password)
    """Key that signs the forms of MLflow's login."""
    mlflow_webhook_key: str = _generated(_fernet_key)
    """Key that encrypts the secrets of webhooks in MLflow's database."""
    webhook_secret: str = _generated(_password)
    """Secret that signs MLflow's messages to the webhook."""


def ensure_secrets(path: Path) -> Secrets:
    """Read the secrets from their file, and generate those that it does not hold yet."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = Secrets(**known)
    if known != (values := dataclasses.asdict(found)):
        write_private(path, json.dumps(values, indent=2) + "\n")
    return found


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at any time."""
    before = os.umask(0o077)
    try:
        atomic_write(path, text)
    finally:
        os.umask(before)
