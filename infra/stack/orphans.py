"""Processes of the stack whose supervisord is gone, found and ended."""

from __future__ import annotations

import os

import psutil

from infra.stack.folder import Folder
from sfgrpo.runtime.process import end_processes, is_running

GRACE_S = 25.0
"""A training takes up to 20 seconds to save its state and leave."""


def processes(folder: Folder, program: str | None = None) -> list[psutil.Process]:
    """Return the processes of the stack, or of one program, without supervisord, this process and its ancestors.

    They are known by the variables that supervisord sets for its children and that their children inherit.
    """
    found = []
    excluded = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid in excluded or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        name = environment.get("SUPERVISOR_PROCESS_NAME")
        if environment.get("SUPERVISOR_SERVER_URL") == f"unix://{folder.socket}" and program in (None, name):
            found.append(process)
    return found


def end_orphans(folder: Folder, program: str | None = None, spare: int | None = None) -> list[int]:
    """End these processes except the process id `spare`, by SIGKILL after the grace period; return the process ids."""
    found = [process for process in processes(folder, program) if process.pid != spare]
    if found:
        end_processes(lambda: [process for process in found if is_running(process)], GRACE_S)
    return [process.pid for process in found]
