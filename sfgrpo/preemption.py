"""Being told to stop: a run that is preempted, cancelled or interrupted saves its state and leaves in time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from sfgrpo.errors import Preempted
from sfgrpo.status import ExitStatus

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Supervisors and schedulers send the first two, a closed terminal the third, Ctrl-C the last."""
KILL_MARGIN_S = 2
"""Between the end of the ranks' grace and the SIGKILL by which their launcher ends those that are left."""
LAUNCHER_MARGIN_S = 4
"""Between the end of the ranks' grace and that of their launcher."""


class StopNotice:
    """Whether this process was told to stop, by the first of `SIGNALS` that it gets within the block.

    The signal raises `Preempted`; inside `deferred()` it only sets `given`, for the code there to look at. The process
    then has `grace_s` seconds to leave the block and is ended with `ExitStatus.RESUMABLE` if it does not. Further
    signals change nothing, since supervisors repeat them, but a second Ctrl-C ends the process at once. Outside the
    main thread, which alone gets signals, no notice is ever given.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._deferred = False
        self._deadline: float | None = None
        self._name = ""
        self._interrupts = 0
        self._told, self._left = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stop-notice", daemon=True)
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def given(self) -> bool:
        """Whether the process was told to stop."""
        return self._deadline is not None

    @property
    def remaining_s(self) -> float:
        """Seconds until the process is ended; infinite while it was not told to stop."""
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leaves it to the block to look at `given`, and to raise `Preempted` once its state is saved."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # A handler interrupts the main thread anywhere, so logging and waiting is another thread's work.
            self._watcher.start()
            # What is ignored stays so: nohup ignores SIGHUP.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Who leaves because it was told to must not die of being told again; neither must a rank that leaves because
        # another one was told.
        leaving = self.given or isinstance(error, Preempted)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)
        self._left.set()
        self._told.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            os._exit(ExitStatus.RESUMABLE)
        if self.given:
            return
        self._deadline = time.monotonic() + self._grace_s
        self._name = signal.Signals(number).name
        self._told.set()
        if not self._deferred:
            raise Preempted("the run was told to stop; starting it again goes on from its last checkpoint")

    def _watch(self) -> None:
        self._told.wait()
        if not self.given:
            return
        logger.warning("told to stop by %s; %g s are left to save the state", self._name, self._grace_s)
        if not self._left.wait(self.remaining_s):
            logger.error("the process is ended: it was still at work %g s after it was told to stop", self._grace_s)
            os._exit(ExitStatus.RESUMABLE)
