"""Names a process so that another one can tell later whether it still runs."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

PROC = Path("/proc")
BOOT_ID = PROC / "sys/kernel/random/boot_id"
STATE_FIELD = 0
START_FIELD = 19
"""Places in /proc/<pid>/stat, counted after the name of the program."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process, by what no other process shares."""

    host: str
    """Name of the machine, or of the container."""
    boot: str
    """Start of the machine's kernel and space of process ids; two containers on one machine differ in the latter."""
    pid: int
    start: int
    """Clock ticks between the start of the kernel and that of the process: process ids are given out again."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"

    @classmethod
    def from_text(cls, host: str, text: str) -> ProcessIdentity | None:
        """Reads what `process` gave; None for anything else."""
        try:
            pid, start, boot = text.split(" ", 2)
            return cls(host=host, boot=boot, pid=int(pid), start=int(start))
        except ValueError:
            return None

    @property
    def process(self) -> str:
        """Spells all but the host in one line."""
        return f"{self.pid} {self.start} {self.boot}"


def this_owner() -> ProcessIdentity | None:
    """Names this process; None on a system without /proc, where nobody could tell later whether it runs."""
    start = _start_of(os.getpid())
    return (
        None
        if start is None
        else ProcessIdentity(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), start=start)
    )


def is_gone(owner: ProcessIdentity) -> bool | None:
    """Tells whether a process has ended; None when that cannot be seen from here.

    A host of the same name that was booted since has none of its earlier processes.
    """
    here = this_owner()
    if here is None or owner.host != here.host:
        return None
    if owner.boot == here.boot:
        return _start_of(owner.pid) != owner.start
    same_kernel = owner.boot.split(" ")[0] == here.boot.split(" ")[0]
    return None if same_kernel else True


def _boot() -> str:
    return f"{BOOT_ID.read_text(encoding='ascii').strip()} {os.stat(PROC / 'self/ns/pid').st_ino}"


def _start_of(pid: int) -> int | None:
    """Reads when a process was started, in clock ticks; None when it is gone or waits to be buried."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[STATE_FIELD] in "ZX" else int(fields[START_FIELD])
