"""Becomes one of the programs: what supervisord calls, with all secrets still unread."""

from __future__ import annotations

import os
import pwd
import time

import psutil

from infra.stack.errors import UnhealthyError
from infra.stack.orphans import end_leftovers
from infra.stack.program import Program, Stack
from infra.stack.table import PROGRAMS
from sfgrpo.runtime.process import die_with_parent

RUN = ["-m", "infra.stack", "run"]
"""Arguments of Python before the name of the program."""
POLL_S = 0.5
FOREIGN = ("AWS_", "MLFLOW_", "PREFECT_", "STACK_")
"""What a shell has set for its own clients means nothing to the programs."""


def run(stack: Stack, program: Program) -> None:
    """Waits for what the program needs, then replaces this process by it."""
    if not program.children_outlive:
        # Of a program that was killed, children may still hold its port.
        end_leftovers(stack.folder, program.name)
    for name in program.needs:
        _wait_for(stack, PROGRAMS[name])
    launch = program.launch(stack)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    os.chdir(launch.working_directory)
    if launch.user is not None:
        _become(launch.user)
    # Last of all, since the kernel forgets it when the user changes.
    die_with_parent(program.stop_signal)
    os.execve(launch.command[0], launch.command, inherited | launch.environment)


def is_still_run(pid: int) -> bool:
    """Tells whether a process has yet to become its program; what answers until then is left from the one before."""
    try:
        return bool(psutil.Process(pid).cmdline()[1:4] == RUN)
    except psutil.NoSuchProcess:
        return True


def _wait_for(stack: Stack, program: Program) -> None:
    told = ""
    while True:
        try:
            program.check(stack, 0.0)
            return
        except UnhealthyError as error:
            if str(error) != told:
                told = str(error)
                print(f"waiting for {program.name}: {told}", flush=True)
            time.sleep(POLL_S)


def _become(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
