"""Start of one program by supervisord, which itself never has the secrets."""

from __future__ import annotations

import os
import pwd
import time

import psutil

from infra.stack.errors import UnhealthyError
from infra.stack.orphans import end_orphans
from infra.stack.program import Program, Stack
from infra.stack.programs.table import PROGRAMS
from sfgrpo.runtime.process import die_with_parent

RUN = ["-m", "infra.stack", "run"]
"""Arguments of Python before the name of the program."""
POLL_S = 0.5
CLIENT_PREFIXES = ("AWS_", "MLFLOW_", "PREFECT_", "STACK_")
"""Variables that a shell has set for clients must not reach the programs."""


def run(stack: Stack, program: Program) -> None:
    """Wait for the programs that this one needs, then replace this process by it."""
    if not program.keeps_children:
        # Children of a program that was killed may still hold its port.
        end_orphans(stack.folder, program.name)
    for name in program.needs:
        _wait_for(stack, PROGRAMS[name])
    launch = program.launch(stack)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_PREFIXES)}
    os.chdir(launch.working_directory)
    if launch.user is not None:
        _switch_user(launch.user)
    # Last of all, since the kernel forgets it when the user changes.
    die_with_parent(program.stop_signal)
    os.execve(launch.command[0], launch.command, inherited | launch.environment)


def is_still_run(pid: int) -> bool:
    """Return whether a process has yet to become its program; until then an earlier process may answer for it."""
    try:
        return bool(psutil.Process(pid).cmdline()[1:4] == RUN)
    except psutil.NoSuchProcess:
        return True


def _wait_for(stack: Stack, program: Program) -> None:
    reason = ""
    while True:
        try:
            program.check(stack)
            return
        except UnhealthyError as error:
            if str(error) != reason:
                reason = str(error)
                print(f"waiting for {program.name}: {reason}", flush=True)
            time.sleep(POLL_S)


def _switch_user(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
