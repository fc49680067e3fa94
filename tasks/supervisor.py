"""Run a command so that none of its processes is left behind, however the run ends.

`dvc repro` leaves its stage running when it is told to stop, and torch starts every rank in its own session, which a
signal to the process group does not reach. The command is therefore the child of a supervisor (this module, run as a
program), to which Linux reparents every orphaned descendant. The supervisor ends them all when it is told to stop and
when its own parent dies. If the supervisor itself is killed, a mark in their environment identifies its orphans.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

import psutil

from sfgrpo.runtime.process import adopt_orphans, die_with_parent, end_processes, is_running, signal_all
from sfgrpo.runtime.startup import SIGNALS

MARK = "STAGE_SUPERVISOR"
"""Environment variable `<pid> <start time> <folder>` of every process below a supervisor."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.2
STOPPED = 128 + signal.SIGTERM
"""Exit status of a command that was told to stop."""
_stopping = threading.Event()
_running: set[int] = set()
"""Process ids of the supervisors that this process waits for."""
CODE = Path(__file__).parents[1]
PROGRAM = "tasks.supervisor"
"""Run from `CODE`, so that it finds this code; the working directory may hold another version of it."""


def run_supervised(
    command: Sequence[str],
    log: Path,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    *,
    grace_s: float,
    stop: threading.Event | None = None,
) -> int:
    """Run a command in the working directory and return its exit status; end it if this call is interrupted.

    The command is also ended once another thread sets `stop`. It then has `grace_s` seconds, and a margin, to leave.
    After `stop_all` this starts nothing and returns `STOPPED`.

    The output goes to the file `log`, and from there to `on_line`: a child that held the output of the calling process
    would hide that process's death from Prefect. The command is in a session of its own, so that Ctrl-C reaches this
    process alone, and the command gets one notice and its grace, however often that is repeated.
    """
    if _stopping.is_set():
        return STOPPED
    end_orphans(Path.cwd(), grace_s)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink, log.open(encoding="utf-8", errors="replace") as source:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(os.getpid()), str(grace_s), str(Path.cwd()), *command],
            cwd=CODE,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        _running.add(supervisor.pid)
        if _stopping.is_set():
            # `stop_all` may have run just before the supervisor was there.
            supervisor.terminate()
        try:
            for line in _follow(source, supervisor, stop):
                on_line(line)
        finally:
            with _undisturbed():
                if supervisor.poll() is None:
                    supervisor.terminate()
                    supervisor.wait()
                _running.discard(supervisor.pid)
                for line in source.read().splitlines():
                    on_line(line.rstrip())
    return supervisor.returncode


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore repeated signals within the block, which waits for a command that was told to stop already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # All of them: a notice is repeated by any that is handled, where Prefect handles SIGTERM itself.
    before = {number: signal.signal(number, _ignore) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    # Not SIG_IGN, which would keep the number from whoever watches the process's wakeup descriptor.
    pass


def stop_all() -> None:
    """End the commands of all threads of this process, for good: an interrupt reaches the main thread only."""
    _stopping.set()
    signal_all([child for child in psutil.Process().children() if _supervises(child)], signal.SIGTERM)


def is_busy() -> bool:
    """Return whether a command runs, or is being ended."""
    return bool(_running)


def is_stopping(within_s: float = 0.0) -> bool:
    """Return whether `stop_all` was called, or is called within so many seconds."""
    return _stopping.wait(within_s)


def end_orphans(folder: Path, grace_s: float) -> list[int]:
    """End the processes that dead supervisors of this folder left behind; return the process ids."""
    orphans = [process for process in psutil.process_iter() if _is_orphan(process, folder)]
    end_processes(lambda: [process for process in orphans if is_running(process)], grace_s)
    return [process.pid for process in orphans]


def marked_folders() -> set[Path]:
    """Return the folders in which supervisors, living and dead, have processes."""
    marks = (_mark_of(process) for process in psutil.process_iter())
    return {mark.folder for mark in marks if mark is not None}


def main(parent_pid: int, grace_s: float, folder: Path, command: Sequence[str]) -> int:
    """Run a command in a folder until it ends or this process is told to stop; return its exit status."""
    for number in STOP_SIGNALS:
        # What is ignored stays ignored: nohup ignores SIGHUP, and a script SIGINT for its background jobs.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    adopt_orphans()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent_pid:
        return 128 + signal.SIGTERM
    me = psutil.Process()
    mark = f"{me.pid} {me.create_time()} {folder}"
    try:
        status = subprocess.Popen(command, cwd=folder, env={**os.environ, MARK: mark}).wait()
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_processes(_living_descendants, grace_s)
    return status if status >= 0 else 128 - status


def _follow(source: TextIO, supervisor: subprocess.Popen[bytes], stop: threading.Event | None) -> Iterator[str]:
    """Yield the non-empty lines of a growing file until the supervisor is done or `stop` is set."""
    rest = ""
    done = False
    while not done:
        done = supervisor.poll() is not None
        *lines, rest = (rest + source.read()).split("\n")
        yield from (line.rstrip() for line in lines if line.strip())
        if stop is not None and stop.is_set():
            return
        if not done:
            time.sleep(POLL_S)
    if rest.strip():
        yield rest.rstrip()


def _supervises(process: psutil.Process) -> bool:
    try:
        return PROGRAM in process.cmdline()
    except psutil.Error:
        return False


class _Mark(NamedTuple):
    """The supervisor of a process, as its environment has it."""

    pid: int
    start: float
    folder: Path


def _mark_of(process: psutil.Process) -> _Mark | None:
    try:
        pid, start, folder = process.environ()[MARK].split(" ", 2)
        return _Mark(int(pid), float(start), Path(folder))
    except (KeyError, ValueError, psutil.Error, OSError):
        return None


def _is_orphan(process: psutil.Process, folder: Path) -> bool:
    mark = _mark_of(process)
    if mark is None or mark.folder != folder:
        return False
    with contextlib.suppress(psutil.Error):
        if psutil.Process(mark.pid).create_time() == mark.start:
            return False
    return True


def _living_descendants() -> list[psutil.Process]:
    """Reap the dead descendants and list those that still run."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [process for process in psutil.Process().children(recursive=True) if is_running(process)]


def _stop(number: int, frame: FrameType | None) -> None:
    # At once, so that a signal that follows closely does not interrupt the ending of the processes.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
