"""Logging, error messages and exit status of every command and every rank."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from sfgrpo.errors import ConfigError, ExitStatus, Preempted, SfgrpoError
from sfgrpo.runtime.rank import is_first_rank, record_error
from sfgrpo.runtime.redaction import SecretFreeFormatter, print_error, without_secrets
from sfgrpo.runtime.shutdown import COMMAND_STOPPED, GRACE_S, GracefulShutdown


def set_up_logging() -> None:
    """Log without secrets: the first rank from INFO on, the others and noisy libraries from WARNING on."""
    level = logging.INFO if is_first_rank() else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SecretFreeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = print_error
    for name in ("httpx", "matplotlib", "accelerate", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Its warnings count attempts, and are printed twice.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run_guarded(command: Callable[[], None]) -> int:
    """Run a command, print an error that the user can correct as one line, and return the exit status.

    A command that is told to stop, whatever it is doing, says so in one line and ends with `ExitStatus.RESUMABLE`.
    """
    try:
        with GracefulShutdown(GRACE_S, COMMAND_STOPPED):
            command()
    except Preempted as error:
        # Every rank was told to stop; one line is enough.
        if is_first_rank():
            print(without_secrets(f"stopped: {error}"), file=sys.stderr)
        return ExitStatus.RESUMABLE
    except Exception as error:
        record_error(error)
        if not isinstance(error, SfgrpoError | OSError):
            raise
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return ExitStatus.WRONG_CONFIGURATION if isinstance(error, ConfigError) else ExitStatus.FAILED
    return ExitStatus.DONE
