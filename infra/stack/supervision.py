"""Client of supervisord, which starts the programs, restarts them when they die, and keeps their logs."""

from __future__ import annotations

import dataclasses
import http.client
import os
import pwd
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from infra.stack.credentials import write_private
from infra.stack.errors import StackError
from infra.stack.folder import Folder
from infra.stack.program import BIN, ROOT, Program
from infra.stack.running import RUN

LOG_SIZE = 10 * 2**20
NUM_OLD_LOGS = 3
NUM_RETRIES = 1000
"""How often a program that dies within its first second is started again, with growing pauses."""
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
    """State of supervisord: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL, UNKNOWN."""
    pid: int
    """Process id; 0 if the program does not run."""
    started_at: float
    """Start of the process, in seconds since 1970."""


class Supervisor:
    """A running supervisord."""

    def __init__(self, folder: Folder) -> None:
        """Make no connection yet."""
        self._url = f"unix://{folder.socket}"

    @property
    def pid(self) -> int:
        """Process id of supervisord itself."""
        return int(self._call("getPID"))

    def processes(self) -> dict[str, Process]:
        """Return all programs that it knows, by name."""
        return {
            entry["name"]: Process(state=entry["statename"], pid=entry["pid"], started_at=float(entry["start"]))
            for entry in self._call("getAllProcessInfo")
        }

    def add_missing(self, names: Iterable[str]) -> None:
        """Reload its configuration and add the programs that it does not know."""
        self._call("reloadConfig")
        for name in set(names) - self.processes().keys():
            self._call("addProcessGroup", name)

    def start(self, name: str) -> None:
        """Start a program without waiting for it."""
        self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        """Stop a program if it runs, and wait until it is gone."""
        if self.processes()[name].state not in STOPPED_STATES:
            self._call("stopProcess", name)

    def shut_down(self) -> None:
        """Tell supervisord to stop all programs and itself."""
        self._call("shutdown")

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(serverurl=self._url)
        # The proxy demands an address by HTTP; the transport ignores it.
        with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as server:
            return getattr(server.supervisor, method)(*arguments)


def running_supervisor(folder: Folder) -> Supervisor | None:
    """Return the supervisord of a folder; None if there is none."""
    supervisor = Supervisor(folder)
    try:
        supervisor.processes()
    except (FileNotFoundError, ConnectionError, http.client.BadStatusLine):
        # The last two: it ended while it was asked.
        return None
    return supervisor


def configuration(folder: Folder, programs: Iterable[Program]) -> str:
    """Return supervisord's configuration. Each program is started by our `run`, so that it holds no secret."""
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
    """Start supervisord in the background with the configuration of `write_configuration`."""
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
    """Write supervisord's configuration into the folder."""
    write_private(folder.configuration, configuration(folder, programs))
