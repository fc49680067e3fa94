"""Finds processes of the stack that nobody looks after any more, and ends them."""

from __future__ import annotations

import os

import psutil

from infra.stack.folder import Folder
from sfgrpo.runtime.process import end_processes, is_running

GRACE_S = 25.0
"""A training takes 20 seconds to save its state and leave."""


def processes(folder: Folder, program: str | None = None) -> list[psutil.Process]:
    """Lists all processes of the stack, or of one program, but supervisord and this process with its ancestors.

    They are known by the variables that supervisord gives to what it starts, and that children inherit.
    """
    found = []
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid in spared or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        name = environment.get("SUPERVISOR_PROCESS_NAME")
        if environment.get("SUPERVISOR_SERVER_URL") == f"unix://{folder.socket}" and program in (None, name):
            found.append(process)
    return found


def end_leftovers(folder: Folder, program: str | None = None, but: int | None = None) -> list[int]:
    """Ends them, except for one process id, by force if need be; returns the process ids."""
    found = [process for process in processes(folder, program) if process.pid != but]
    if found:
        end_processes(lambda: [process for process in found if is_running(process)], GRACE_S)
    return [process.pid for process in found]
