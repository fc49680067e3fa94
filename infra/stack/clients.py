"""What a program has to know to use the stack: the file `env` that a shell sources."""

from __future__ import annotations

import shlex

from infra.stack.program import Stack
from infra.stack.programs import mlflow, prefect, s3


def client_environment(stack: Stack) -> dict[str, str]:
    """Gives the variables by which a program finds everything, and is let in."""
    return {
        **prefect.client_environment(stack),
        **mlflow.client_environment(stack),
        **s3.client_environment(stack),
        "SFGRPO_MIRROR": "s3://runs/train",
        "SFGRPO_DVC_REMOTE": "s3://dvc/store",
        "WEBHOOK_SECRET": stack.secrets.webhook_secret,
    }


def env_file(stack: Stack) -> str:
    """Writes these variables for a shell."""
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in client_environment(stack).items())
    return "".join(lines)
