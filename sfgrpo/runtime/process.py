"""Processes: what identifies one, whether it still runs, how it dies with its parent, and how to end it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

PROC = Path("/proc")
BOOT_ID = PROC / "sys/kernel/random/boot_id"
STATE_FIELD = 0
START_FIELD = 19
"""Positions in /proc/<pid>/stat, counted after the name of the program."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Of linux/prctl.h."""
GRACE_MARGIN_S = 5.0
"""Time between the end of the grace of processes and SIGKILL; Prefect gives a cancelled flow 30 s in all."""
POLL_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """What no two processes share, on any machine and at any time."""

    host: str
    """Name of the machine, or of the container."""
    boot: str
    """Boot id of the kernel and inode of the pid namespace; two containers on one machine differ in the latter."""
    pid: int
    start: int
    """Clock ticks from the start of the kernel to that of the process, since process ids are reused.

    `psutil.Process.create_time` would not do: it follows the wall clock, which may be set while the process runs.
    """

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"

    @classmethod
    def from_text(cls, host: str, text: str) -> ProcessIdentity | None:
        """Parse `"pid start boot"`; return None for anything else."""
        try:
            pid, start, boot = text.split(" ", 2)
            return cls(host=host, boot=boot, pid=int(pid), start=int(start))
        except ValueError:
            return None

    @property
    def process(self) -> str:
        """`"pid start boot"`."""
        return f"{self.pid} {self.start} {self.boot}"


def this_process() -> ProcessIdentity | None:
    """Identify this process; None on a system without /proc, where nobody could tell later whether it runs."""
    pid = os.getpid()
    if (start := _start_of(pid)) is None:
        return None
    boot = f"{BOOT_ID.read_text(encoding='ascii').strip()} {os.stat(PROC / 'self/ns/pid').st_ino}"
    return ProcessIdentity(host=socket.gethostname(), boot=boot, pid=pid, start=start)


def is_gone(process: ProcessIdentity) -> bool | None:
    """Return whether a process has ended; None when that cannot be seen from here."""
    here = this_process()
    if here is None or process.host != here.host:
        return None
    if process.boot == here.boot:
        return _start_of(process.pid) != process.start
    # A host that was booted since has none of its earlier processes; another pid namespace hides those it has.
    same_kernel = process.boot.split(" ")[0] == here.boot.split(" ")[0]
    return None if same_kernel else True


def _start_of(pid: int) -> int | None:
    """Return when a process was started, in clock ticks; None when it is gone or a zombie."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[STATE_FIELD] in "ZX" else int(fields[START_FIELD])


def is_running(process: psutil.Process) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to all processes that still exist."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def end_processes(remaining: Callable[[], Sequence[psutil.Process]], grace_s: float) -> None:
    """Send SIGTERM to all that remain, and SIGKILL to those that still do after the grace time and a margin."""
    signal_all(remaining(), signal.SIGTERM)
    deadline = time.monotonic() + grace_s + GRACE_MARGIN_S
    while remaining() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    # A process may have started another one meanwhile, hence more than once.
    for _ in range(10):
        if not (stubborn := remaining()):
            return
        signal_all(stubborn, signal.SIGKILL)
        time.sleep(POLL_S)


def die_with_parent(number: signal.Signals) -> None:
    """Make Linux send a signal to this process when its parent dies; a change of user undoes this."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Make Linux give every orphaned descendant to this process."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    """Call prctl(2); do nothing on systems other than Linux."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, int(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl refuses option {option}")
