"""Environment of the stack's clients: the file `env` that a shell sources."""

from __future__ import annotations

import shlex

from infra.stack.program import Stack
from infra.stack.programs import mlflow, prefect, s3


def client_environment(stack: Stack) -> dict[str, str]:
    """Return the addresses and credentials that a client needs, as environment variables."""
    return {
        **prefect.client_environment(stack),
        **mlflow.client_environment(stack),
        **s3.client_environment(stack),
        "SFGRPO_MIRROR": "s3://runs/train",
        "SFGRPO_DVC_REMOTE": "s3://dvc/store",
        "WEBHOOK_SECRET": stack.secrets.webhook_secret,
    }


def env_file(stack: Stack) -> str:
    """Return these variables as a shell script."""
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in client_environment(stack).items())
    return "".join(lines)
