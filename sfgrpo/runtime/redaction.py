"""Redaction of credentials in messages, logs and tracebacks."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from types import TracebackType

VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "WEBHOOK_SECRET",
)
"""Environment variables that hold a secret."""


def without_secrets(text: str) -> str:
    """Replace passwords in addresses and the secrets of the environment by asterisks."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    for name in VARIABLES:
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "***")
    return text


class SecretFreeFormatter(logging.Formatter):
    """Formatter that redacts all that is logged, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted text of a record."""
        return without_secrets(super().format(record))


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error as Python does, but redacted; a `sys.excepthook`."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
