"""Talks to supervisord, which starts the programs, starts them again when they die, and keeps their logs."""

from __future__ import annotations

import dataclasses
import http.client
import os
import pwd
import shlex
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.stack.errors import StackError
from infra.stack.folder import Folder
from infra.stack.program import BIN, ROOT, Program
from infra.stack.running import RUN
from infra.stack.secrets import write_private

LOG_SIZE = 10 * 2**20
NUM_OLD_LOGS = 3
NUM_RETRIES = 1000
"""Times that a program which dies within its first second is tried again, with growing pauses."""
STOPPED_STATES = ("STOPPED", "EXITED", "FATAL")
ANSWER_TIMEOUT_S = 15.0

SERVER = """\
[supervisord]
directory = {directory}
logfile = {private}/log
logfile_maxbytes = {log_size}
logfile_backups = {num_old_logs}
pidfile = {private}/pid
childlogdir = {private}
loglevel = info
user = {user}

[unix_http_server]
file = {socket}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""

PROGRAM = """
[program:{name}]
command = {command}
priority = {priority}
autostart = false
autorestart = true
startsecs = 1
startretries = {num_retries}
stopsignal = {stop_signal}
stopwaitsecs = {stop_timeout_s}
stopasgroup = true
killasgroup = true
redirect_stderr = true
stdout_logfile = {log}
stdout_logfile_maxbytes = {log_size}
stdout_logfile_backups = {num_old_logs}
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A program as supervisord sees it."""

    state: str
    """In supervisord's words: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL, UNKNOWN."""
    pid: int
    """Process id; 0 when it does not run."""
    started_at: float
    """Start of the process, in seconds since 1970."""


class Supervisor:
    """A supervisord that runs."""

    def __init__(self, folder: Folder) -> None:
        """Contacts nobody."""
        self._socket = folder.socket

    @property
    def pid(self) -> int:
        """Process id of supervisord itself."""
        return int(self._call("getPID"))

    def processes(self) -> dict[str, Process]:
        """Lists all programs it knows."""
        return {
            entry["name"]: Process(state=entry["statename"], pid=entry["pid"], started_at=float(entry["start"]))
            for entry in self._call("getAllProcessInfo")
        }

    def add_missing(self, names: Iterable[str]) -> None:
        """Lets it read its configuration again, and takes in the programs it does not know."""
        self._call("reloadConfig")
        for name in set(names) - self.processes().keys():
            self._call("addProcessGroup", name)

    def start(self, name: str) -> None:
        """Starts a program that does not run, without waiting for it."""
        self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        """Stops a program, and waits until it is gone; one that does not run is left so."""
        if self.processes()[name].state not in STOPPED_STATES:
            self._call("stopProcess", name)

    def shut_down(self) -> None:
        """Tells supervisord to stop all programs and itself."""
        self._call("shutdown")

    def _call(self, method: str, *arguments: Any) -> Any:
        with xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(self._socket)) as server:
            return getattr(server.supervisor, method)(*arguments)


class _Transport(xmlrpc.client.Transport):
    """Carries calls over a socket of the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """Makes the connection that `request` uses, and `close` closes."""
        connection = _Connection(self._path)
        self._connection = host, connection
        return connection


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def running_supervisor(folder: Folder) -> Supervisor | None:
    """Finds the supervisord of a folder; None if there is none."""
    supervisor = Supervisor(folder)
    try:
        supervisor.processes()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    return supervisor


def configuration(folder: Folder, programs: Iterable[Program]) -> str:
    """Writes what supervisord reads. Each program is started by our `run`, so that no secret is in here."""
    common = {"log_size": LOG_SIZE, "num_old_logs": NUM_OLD_LOGS, "num_retries": NUM_RETRIES}
    text = SERVER.format(
        directory=ROOT,
        private=folder.private,
        socket=folder.socket,
        user=pwd.getpwuid(os.geteuid()).pw_name,
        **common,
    )
    for number, program in enumerate(programs):
        command = [str(BIN / "python"), *RUN, program.name]
        text += PROGRAM.format(
            name=program.name,
            command=shlex.join(command),
            priority=number,
            stop_signal=program.stop_signal.name.removeprefix("SIG"),
            stop_timeout_s=program.stop_timeout_s,
            log=folder.log(program.name),
            **common,
        )
    return text


def start_supervisor(folder: Folder) -> Supervisor:
    """Starts supervisord in the background, with what `write_configuration` has written."""
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(folder.configuration)],
        cwd=ROOT,
        env={**os.environ, "STACK_DIR": str(folder.root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise StackError(f"supervisord does not start: {(done.stdout + done.stderr).strip()}")
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while (supervisor := running_supervisor(folder)) is None:
        if time.monotonic() > deadline:
            raise StackError(f"supervisord does not answer; see {folder.private / 'log'}")
        time.sleep(0.1)
    return supervisor


def write_configuration(folder: Folder, programs: Iterable[Program]) -> None:
    """Writes supervisord's configuration into the folder."""
    write_private(folder.configuration, configuration(folder, programs))
