"""The local stack of `infra/stack`, run as a user runs it, for tests that need all of it or kill a part of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.stack.folder import Folder, open_folder
from infra.stack.orphans import processes
from infra.stack.supervision import running_supervisor
from tests.support.paths import ROOT

PORTS = ("STACK_POSTGRES_PORT", "STACK_S3_PORT", "STACK_MLFLOW_PORT", "STACK_PREFECT_PORT", "STACK_WEBHOOK_PORT")
BELOW_EPHEMERAL = range(20000, 32000)
"""Ports that no client gets for its end of a connection between our looking and the server's listening."""
FOREIGN = ("PREFECT_", "MLFLOW_", "AWS_", "STACK_", "SFGRPO_", "DVC_", "GIT_", "PYTEST_", "WEBHOOK_")
HEALTH_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 300.0
POLL_S = 0.5


class Stack:
    """A stack in a folder of its own below /tmp, on free ports; a context that starts it and removes everything."""

    def __init__(self, prefix: Sequence[str] = (), **variables: str) -> None:
        """Start nothing yet; take the start of every command line, such as another user's, and STACK_ variables."""
        # Short, since it holds a socket, and open, since PostgreSQL's user passes through.
        self.parent = Path(tempfile.mkdtemp(prefix="stack-", dir="/tmp"))
        self.parent.chmod(0o711)
        ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        # Where the tests are root's, the stack is, unless it is an ordinary user's.
        root = {"STACK_ALLOW_ROOT": "true"} if os.geteuid() == 0 and not prefix else {}
        self.variables = {"STACK_DIR": str(self.parent / "s"), **ports, **root, **variables}
        self._prefix = list(prefix)
        self.first_start_s = 0.0
        """What the start from an empty folder took."""

    def __enter__(self) -> Stack:
        begin = time.monotonic()
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        self.first_start_s = time.monotonic() - begin
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def folder(self) -> Folder:
        return open_folder(Path(self.variables["STACK_DIR"]))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user who has sourced the stack's file `env`."""
        script = '. "$0" && exec env -0'
        done = subprocess.run(["sh", "-c", script, self.folder.env], env=_clean(), capture_output=True, check=True)
        return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)

    def command(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m infra.stack ...`, with further variables, and return the finished process."""
        return subprocess.run(
            [*self._prefix, sys.executable, "-m", "infra.stack", *arguments],
            cwd=ROOT,
            env=_clean() | self.variables | variables,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )

    def start(self) -> str:
        """Start everything that does not run and wait until it is healthy; return the output."""
        return _succeeded(self.command("up"))

    def stop(self) -> str:
        """Stop everything; return the output."""
        return _succeeded(self.command("down"))

    def remove(self) -> None:
        """Stop everything and remove the data."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.parent)

    def status(self) -> dict[str, dict[str, Any]]:
        """Ask for the state of each program, by its name."""
        return {entry["program"]: entry for entry in json.loads(self.command("status", "--json").stdout)}

    def pid(self, program: str) -> int:
        """Return the process id of a program; 0 if it does not run."""
        supervisor = running_supervisor(self.folder)
        assert supervisor is not None, "the stack does not run"
        return supervisor.processes()[program].pid

    def kill(self, program: str) -> None:
        """Kill a program as a crash would, without waiting for anything."""
        os.kill(self.pid(program), signal.SIGKILL)

    def wait_until_healthy(self, timeout_s: float = HEALTH_TIMEOUT_S) -> dict[str, dict[str, Any]]:
        """Wait until all programs are healthy; return their states."""
        found = self.status()
        deadline = time.monotonic() + timeout_s
        while any(entry["health"] != "healthy" for entry in found.values()):
            assert time.monotonic() < deadline, f"not healthy within {timeout_s:.0f} s: {found}"
            time.sleep(POLL_S)
            found = self.status()
        return found

    def kill_and_heal(self, program: str) -> dict[str, dict[str, Any]]:
        """Kill a program; wait until it has a new process and all are healthy; return their states."""
        killed = self.pid(program)
        self.kill(program)
        return self.wait_until_healed(program, killed)

    def wait_until_healed(self, program: str, killed: int) -> dict[str, dict[str, Any]]:
        """Wait until a killed program has a new process and all are healthy; return their states."""
        wait_until(lambda: self.pid(program) not in (0, killed), f"{program} is not started again")
        return self.wait_until_healthy()

    def processes(self) -> list[psutil.Process]:
        """List every process of the stack, including supervisord."""
        supervisor = running_supervisor(self.folder)
        return processes(self.folder) + ([] if supervisor is None else [psutil.Process(supervisor.pid)])


def wait_until(condition: Callable[[], bool], failure: str, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
    """Wait until a condition holds; fail if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{failure} within {timeout_s:.0f} s"
        time.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    """Return free ports of this machine."""
    found: set[int] = set()
    while len(found) < count:
        port = random.choice(BELOW_EPHEMERAL)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.add(port)
    return list(found)


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
