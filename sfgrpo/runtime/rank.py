"""Ranks of a distributed training: detection, death with the launcher, and error files for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from pathlib import Path

from sfgrpo.errors import ExitStatus
from sfgrpo.runtime.process import die_with_parent
from sfgrpo.runtime.redaction import without_secrets

LAUNCHER = "STAGE_LAUNCHER"
"""Environment variable with the process id of the launcher, for its ranks."""


def is_rank() -> bool:
    """Return whether torch's elastic launcher, ours or torchrun, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_rank() -> bool:
    """Return whether this process is rank 0 or the only one."""
    return os.environ.get("RANK", "0") == "0"


def die_with_launcher() -> None:
    """Make Linux kill this rank when its launcher dies: it is in a session of its own, so nothing else would."""
    die_with_parent(signal.SIGKILL)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        # The launcher died before the call above.
        os._exit(ExitStatus.RESUMABLE)


def record_error(error: Exception) -> None:
    """Write the error that ends a rank to the file where the launcher looks for it, in torch's format."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        trace = without_secrets("".join(traceback.format_exception(error)))
        details = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        message = {"message": without_secrets(f"{type(error).__name__}: {error}"), "extraInfo": details}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
