"""A flow as a program: what it says in the end, and how it leaves when it is told to stop."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sfgrpo.config.stages import Stage
from sfgrpo.errors import ConfigError, ExitStatus, Preempted
from sfgrpo.paths import PARAMS
from sfgrpo.preflight.checkout import find_checkout
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.process import GRACE_MARGIN_S
from sfgrpo.runtime.redaction import without_secrets
from sfgrpo.runtime.shutdown import GracefulShutdown
from tasks import supervisor
from tasks.overrides import check_parameters
from tasks.server import temporary_server
from tasks.stages import StageError, unfinished_stages

STARTED_BY = "STARTED_BY"
"""Environment variable: what a person has typed, where that is not the command of this process."""
LEAVING_S = 4.0
"""Time to report to Prefect, once no stage runs any more; a server that is away would take minutes."""


@contextlib.contextmanager
def flow_as_program(stages: Sequence[type[Stage]] = ()) -> Iterator[None]:
    """Let the block run a flow, which runs these stages, as a program.

    A failed stage or a wrong configuration is a message and exit status 1. SIGTERM, SIGHUP and SIGINT stop the stages,
    which have their grace to save their state. Then the program ends with `ExitStatus.RESUMABLE`, and its last line
    says what was saved and how to go on. What would fail in every stage is found before Prefect starts.
    """
    try:
        find_checkout(Path.cwd())
        check_parameters(Path(PARAMS), stages)
        with _FlowShutdown(read_environment().grace_s + GRACE_MARGIN_S + LEAVING_S) as shutdown:
            # What is registered last runs first, so this follows what Prefect has to report and to say at the end.
            atexit.register(shutdown.end_if_leaving)
            try:
                with temporary_server(lambda: not shutdown.stop_requested):
                    yield
            except BaseException as error:
                if not shutdown.stop_requested:
                    raise
                shutdown.leave()
                raise Preempted("the flow was told to stop") from error
    except (StageError, ConfigError) as error:
        sys.exit(without_secrets(str(error)))


class _FlowShutdown(GracefulShutdown):
    """Shutdown of a flow: its stages are told to stop, and Ctrl-C is not the more urgent for being repeated."""

    _idle_since: float | None = None
    _is_leaving = False

    @property
    def remaining_s(self) -> float:
        """Seconds until the process is ended: not many once no stage runs."""
        remaining_s = super().remaining_s
        if not self.stop_requested or supervisor.is_busy():
            self._idle_since = None
            return remaining_s
        self._idle_since = self._idle_since or time.monotonic()
        return max(0.0, min(remaining_s, self._idle_since + LEAVING_S - time.monotonic()))

    def end_if_leaving(self) -> None:
        """Print the last line and end the process, if it was told to stop."""
        if self._is_leaving:
            self._end()

    def leave(self) -> None:
        """See to it that the process ends in time, whatever Prefect does at its end."""
        self._is_leaving = True
        timer = threading.Timer(LEAVING_S, self._end)
        timer.daemon = True
        timer.start()

    def _on_notice(self, name: str) -> None:
        supervisor.stop_all()

    def _on_second_interrupt(self) -> None:
        pass

    def _end(self) -> None:
        print(last_line(), file=sys.stderr, flush=True)
        os._exit(ExitStatus.RESUMABLE)


def last_line() -> str:
    """Say what the stages that were stopped have said about their state, and which command goes on."""
    command = os.environ.get(STARTED_BY) or " ".join(sys.orig_argv)
    stages = unfinished_stages()
    if not stages:
        return f"stopped: no stage was running; start it again: {command}"
    if len(stages) > 1:
        logs = "logs/*.log"
        return f"stopped in {len(stages)} stages; what each has saved is in the last line of {logs}; go on: {command}"
    ((stage, words),) = stages.items()
    words = words or f"it said nothing of a state that is saved, see {Path('logs') / stage}.log; start it again"
    return f"stopped in stage {stage}: {words}: {command}"
