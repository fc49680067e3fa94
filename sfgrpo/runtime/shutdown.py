"""Graceful shutdown: a run that is preempted, cancelled or interrupted saves its state and leaves in time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from sfgrpo.errors import ExitStatus, Preempted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Supervisors and schedulers send the first two, a closed terminal sends the third, Ctrl-C the last."""
KILL_MARGIN_S = 2
"""From the end of the ranks' grace to the SIGKILL that their launcher sends to those that are left."""
LAUNCHER_MARGIN_S = 4
"""From the end of the ranks' grace to that of their launcher."""

END = b"\0"
"""No signal has this number."""


class GracefulShutdown:
    """Context manager that lets a process save its state when one of `SIGNALS` tells it to stop.

    The first signal raises `Preempted`; inside `deferred()` it only sets `stop_requested`, which the code there has to
    check. The process then has `grace_s` seconds to leave the block, after which it is ended with
    `ExitStatus.RESUMABLE`. Further signals change nothing, since supervisors repeat them, except that a second Ctrl-C
    ends the process at once. Only the main thread receives signals; in any other, no stop is ever requested.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._deferred = self._signalled = False
        self._deadline: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether the process was told to stop."""
        return self._deadline is not None

    @property
    def remaining_s(self) -> float:
        """Seconds until the process is ended; infinite while it was not told to stop."""
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave it to the block to check `stop_requested`, and to raise `Preempted` once its state is saved."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        # A handler runs only when the main thread is back in Python, and a collective whose partner is gone never comes
        # back. The wakeup descriptor still gets the signal's number, and another thread enforces the deadline.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, name="graceful-shutdown", daemon=True)
        self._watcher.start()
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        # What is ignored stays ignored: nohup ignores SIGHUP.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        # A process that is leaving must not die of a second signal; neither must a rank that leaves because another
        # one was told to.
        leaving = self.stop_requested or isinstance(error, Preempted)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._sender.setblocking(True)
        self._sender.sendall(END)
        self._watcher.join()
        self._sender.close()
        self._receiver.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            return
        self._signalled = True
        self._start_grace()
        if not self._deferred:
            raise Preempted("the run was told to stop; starting it again resumes it from its last checkpoint")

    def _start_grace(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s

    def _watch(self) -> None:
        """Start the grace at the first signal; end the process after it, or at the second Ctrl-C."""
        numbers: list[int] = []
        try:
            while (received := self._receiver.recv(1)) != END:
                if received[0] not in SIGNALS:
                    continue
                numbers.append(received[0])
                if numbers.count(signal.SIGINT) == 2:
                    os._exit(ExitStatus.RESUMABLE)
                self._start_grace()
                if len(numbers) == 1:
                    name = signal.Signals(numbers[0]).name
                    logger.warning("told to stop by %s; %g s are left to save the state", name, self._grace_s)
                # 0 would make the socket non-blocking.
                self._receiver.settimeout(max(0.001, self.remaining_s))
        except TimeoutError:
            logger.error("the process is ended: it was still running %g s after it was told to stop", self._grace_s)
            os._exit(ExitStatus.RESUMABLE)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM raise `SystemExit` within the block, so that cleanup runs; does nothing in other threads."""
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
