"""Graceful shutdown: a process that is preempted, cancelled or interrupted saves its state and leaves in time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from sfgrpo.errors import ExitStatus, Preempted
from sfgrpo.runtime.startup import SIGNALS

logger = logging.getLogger(__name__)

GRACE_S = 20.0
"""Time of a command that has no state to save, to close what it has opened."""
KILL_MARGIN_S = 2
"""From the end of the ranks' grace to the SIGKILL that their launcher sends to those that are left."""
LAUNCHER_MARGIN_S = 4
"""From the end of the ranks' grace to that of their launcher."""
REPEAT_S = 1.0
"""Time after which a notice is repeated to code that has swallowed its exception."""
COMMAND_STOPPED = "the command was told to stop before it was done; start it again"
RANKS_STOPPED = "the run was told to stop; starting it again resumes it from its last checkpoint"
RUN_STOPPED = "the run was told to stop outside its updates; nothing is lost, and starting it again goes on"

END = b"\0"
"""No signal has this number."""


class GracefulShutdown:
    """Context manager that lets a process save its state when one of `SIGNALS` tells it to stop.

    The first signal raises `Preempted` with `message`; inside `deferred()` it only sets `stop_requested`, which the
    code there has to check. Any error that leaves the block after that counts as `Preempted`, since a library that was
    interrupted may fail in its own way. The process has `grace_s` seconds to leave the block, after which it is ended
    with `ExitStatus.RESUMABLE`. Further signals change nothing, since supervisors repeat them, except that a second
    Ctrl-C ends the process at once. Only the main thread receives signals; in any other, no stop is ever requested.
    """

    def __init__(self, grace_s: float, message: str = RUN_STOPPED) -> None:
        self._grace_s, self._message = grace_s, message
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
        with _signals_blocked():
            self._install()
        return self

    def _install(self) -> None:
        # A handler runs only when the main thread is back in Python, and a collective whose partner is gone never comes
        # back. The wakeup descriptor still gets the signal's number, and another thread enforces the deadline.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, name="graceful-shutdown", daemon=True)
        self._watcher.start()
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
        # What is ignored stays ignored: nohup ignores SIGHUP, and a script SIGINT for its background jobs.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            with _signals_blocked():
                # A process that is leaving must not die of a second signal; neither must a rank that leaves because
                # another one was told to.
                self._uninstall(leaving=self.stop_requested or isinstance(error, Preempted))
        if self.stop_requested and isinstance(error, Exception):
            own = "" if _comes_of_preemption(error) else f" (it ended with {type(error).__name__}: {error})"
            raise Preempted(f"{self._message}{own}") from error

    def _uninstall(self, *, leaving: bool) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)
        sys.unraisablehook = self._previous_hook
        signal.set_wakeup_fd(self._previous_fd)
        self._sender.setblocking(True)
        self._sender.sendall(END)
        self._watcher.join()
        self._sender.close()
        self._receiver.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._start_grace()
        # A repeated notice must not disturb what the first one has set going.
        if not self._deferred and not _comes_of_preemption(sys.exc_info()[1]):
            raise Preempted(self._message)

    def _start_grace(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s

    def _watch(self) -> None:
        """Start the grace at the first signal; end the process after it, or at the second Ctrl-C."""
        num_interrupts = 0
        while (number := self._received()) != END[0]:
            num_interrupts += number == signal.SIGINT
            if number == signal.SIGINT and num_interrupts == 2:
                self._on_second_interrupt()
            if number in SIGNALS and not self._signalled:
                self._signalled = True
                self._start_grace()
                self._on_notice(signal.Signals(number).name)

    def _on_notice(self, name: str) -> None:
        logger.warning("told to stop by %s; %g s are left to save the state", name, self._grace_s)

    def _on_second_interrupt(self) -> None:
        os._exit(ExitStatus.RESUMABLE)

    def _end(self) -> None:
        logger.error("the process is ended: it ran for %g s after it was told to stop", self._grace_s)
        os._exit(ExitStatus.RESUMABLE)

    def _received(self) -> int:
        """Wait for a number, repeating the notice meanwhile; end the process when its grace is over."""
        while True:
            # 0 would make the socket non-blocking.
            self._receiver.settimeout(max(0.001, min(REPEAT_S, self.remaining_s)) if self._signalled else None)
            try:
                return self._receiver.recv(1)[0]
            except TimeoutError:
                if not self.remaining_s:
                    self._end()
                self._repeat()

    def _repeat(self) -> None:
        """Send the main thread a signal that this object still handles; another Ctrl-C would mean something else."""
        handled = [number for number in self._previous if signal.getsignal(number) == self._handle]
        if numbers := [number for number in handled if number != signal.SIGINT]:
            signal.pthread_kill(threading.main_thread().ident or 0, numbers[0])

    def _report_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Pass on what was raised where Python can only ignore it, except the notice: that is repeated."""
        if not isinstance(unraisable.exc_value, Preempted):
            self._previous_hook(unraisable)


def _comes_of_preemption(error: BaseException | None) -> bool:
    """Return whether an exception is `Preempted`, or was raised while that was handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Preempted):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep signals to stop waiting until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
