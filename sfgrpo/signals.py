"""Turns the signal by which supervisors stop a process into an exception."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit` within the block, so that cleaning up runs; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
