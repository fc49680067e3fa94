"""Signals to stop in the first second of a program, before it has loaded what handles them.

Import this first: it loads nothing that the interpreter has not.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

RESUMABLE = 75
"""`sfgrpo.errors.ExitStatus.RESUMABLE`."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Supervisors and schedulers send the first two, a closed terminal sends the third, Ctrl-C the last."""


def leave_when_told() -> None:
    """End the process at once, with one line, when it is told to stop; what is ignored stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped: told to stop before it was done; start it again\n")
    os._exit(RESUMABLE)
