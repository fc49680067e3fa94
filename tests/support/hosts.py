"""Hosts without a shared disk, for tests of several nodes: network namespaces on a switch whose ports can be cut.

A host has a name, an address and a network stack of its own. A node of a training runs on a host under a small service
manager, which starts it again as Kubernetes, Slurm or systemd would: when it was killed, and when it left with
`ExitStatus.RESUMABLE`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sfgrpo.errors import ExitStatus

NAMESPACES = "sfgrpo-test"
PREFIX = "10.77.0"
SWITCH = f"{PREFIX}.254"
CLONE_NEWNET = 0x40000000
POLL_S = 0.05
KILL_TIMEOUT_S = 20
_numbers = itertools.count()


class HostsUnavailableError(Exception):
    """This process may not make network namespaces; the message says what is missing."""


class Network:
    """A switch and its hosts; the block removes them, with every process that is left on them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Take a folder for the network's own files; make nothing until the block is entered."""
        self._prefix = f"{NAMESPACES}-{os.getpid()}-{next(_numbers)}"
        self._namespaces: list[str] = []
        self._hosts_file = folder / "etc-hosts"
        self.hosts = {
            name: Host(name, f"{PREFIX}.{number}", f"{self._prefix}-{name}", self._switch, self._hosts_file)
            for number, name in enumerate(names, start=1)
        }

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def __enter__(self) -> Self:
        lines = [f"{host.address} {host.name}" for host in self.hosts.values()]
        self._hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        _remove_stale()
        switch = f"-n {self._switch}"
        try:
            self._add_namespace(self._switch)
            _ip(f"{switch} link add bridge type bridge")
            _ip(f"{switch} address add {SWITCH}/24 dev bridge")
            _ip(f"{switch} link set bridge up")
            for host in self.hosts.values():
                self._add_namespace(host.namespace)
                _ip(f"{switch} link add {host.name} type veth peer name eth0 netns {host.namespace}")
                _ip(f"{switch} link set {host.name} master bridge up")
                _ip(f"-n {host.namespace} address add {host.address}/24 dev eth0")
                _ip(f"-n {host.namespace} link set eth0 up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @contextlib.contextmanager
    def exposed(self, port: int) -> Iterator[str]:
        """Let the hosts reach a port of the real machine within the block; yield host:port."""
        with self._listener() as listener:
            thread = threading.Thread(target=_accept, args=(listener, ("127.0.0.1", port)), daemon=True)
            thread.start()
            try:
                yield f"{SWITCH}:{listener.getsockname()[1]}"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _listener(self) -> socket.socket:
        """Make a socket that listens on the switch; a socket stays in the namespace in which it was made."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as own, Path("/var/run/netns", self._switch).open() as other:
            if libc.setns(other.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"the namespace {self._switch} cannot be entered")
            try:
                return socket.create_server((SWITCH, 0))
            finally:
                assert libc.setns(own.fileno(), CLONE_NEWNET) == 0, "this process is lost in another namespace"

    def _add_namespace(self, name: str) -> None:
        _ip(f"netns add {name}")
        self._namespaces.append(name)
        _ip(f"-n {name} link set lo up")

    def _remove(self) -> None:
        for host in self.hosts.values():
            if host.namespace in self._namespaces:
                host.kill()
        while self._namespaces:
            _ip(f"netns delete {self._namespaces.pop()}")


class Host:
    """A machine of the network."""

    def __init__(self, name: str, address: str, namespace: str, switch: str, hosts_file: Path) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self._switch = switch
        self._hosts_file = hosts_file

    def start(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a program in a folder, which dies with this process; its output is appended to a log."""
        # The mounts are the namespace's own, by `ip netns exec`, and so is the host's name, by unshare.
        enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        isolated = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "setpriv", "--pdeathsig", "KILL"]
        named = ["sh", "-c", enter, "sh", self.name, str(self._hosts_file)]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*isolated, *named, *command],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def processes(self) -> list[int]:
        """List the processes of the host."""
        return [int(line) for line in _ip(f"netns pids {self.namespace}").split()]

    def kill(self) -> None:
        """Kill all processes of the host at once."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while pids := self.processes():
            assert time.monotonic() < deadline, f"{self.name} has processes that cannot be killed: {pids}"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Unplugs the host from the switch for the length of the block."""
        _ip(f"-n {self._switch} link set {self.name} down")
        try:
            yield
        finally:
            _ip(f"-n {self._switch} link set {self.name} up")


class Node:
    """A program under the service manager of its host."""

    def __init__(
        self, host: Host, command: Sequence[str], folder: Path, environment: Mapping[str, str], pause_s: float
    ) -> None:
        """Start nothing yet; a program that has to be restarted is so after `pause_s` seconds."""
        self.host = host
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.statuses: list[int] = []
        """How the program has ended, each time."""
        self._command, self._environment, self._pause_s = command, environment, pause_s
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at: float | None = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the program has ended and is not to be started again."""
        return self._process is None and self._start_at is None

    def supervise(self) -> None:
        """Do one round of a service manager."""
        if self._process is not None and (status := self._process.poll()) is not None:
            self._note(f"the node has ended with exit status {status}")
            self.statuses.append(status)
            self._process = None
            to_restart = status in (-signal.SIGKILL, ExitStatus.RESUMABLE)
            self._start_at = time.monotonic() + self._pause_s if to_restart else None
        if self._process is None and self._start_at is not None and time.monotonic() >= self._start_at:
            self._note("the node is started")
            self._process = self.host.start(self._command, self.folder, self._environment, self.log)
            self._start_at = None

    def stop(self) -> None:
        """End all processes of the host, for good."""
        self._start_at = None
        self.host.kill()
        if self._process is not None:
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Kill all processes of the host; the service manager then restarts the program."""
        self._note("all that runs here is killed")
        self.host.kill()

    def lose_disk(self, lay_out: Callable[[Path], object]) -> None:
        """Replaces the folder, of which nothing may be in use, by a fresh one."""
        self._note("the host has a new disk")
        shutil.rmtree(self.folder)
        lay_out(self.folder)

    def output(self) -> str:
        """Return the output of the program, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _note(self, event: str) -> None:
        with self.log.open("a") as log:
            log.write(f"---- {time.strftime('%H:%M:%S')} {self.host.name}: {event}\n")


def wait_until(condition: Callable[[], bool], nodes: Sequence[Node], what: str, timeout_s: float) -> None:
    """Run the nodes' service managers until a condition holds; fail with the nodes' output if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        for node in nodes:
            node.supervise()
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{outputs(nodes)}"
        time.sleep(POLL_S)


def wait_for(seconds: float, nodes: Sequence[Node]) -> None:
    """Run the nodes' service managers for so many seconds."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, nodes, "the end of a pause", 2 * seconds + 1)


def outputs(nodes: Sequence[Node]) -> str:
    """Return the output of all nodes, node by node."""
    return "\n".join(f"======== {node.host.name}, exit statuses {node.statuses}\n{node.output()}" for node in nodes)


def _remove_stale() -> None:
    """Remove the namespaces of test processes that were killed; their processes have died with these."""
    for line in _ip("netns list").splitlines():
        name = line.split()[0]
        if (match := re.fullmatch(rf"{NAMESPACES}-(\d+)-.*", name)) and not Path("/proc", match[1]).exists():
            _ip(f"netns delete {name}")


def _accept(listener: socket.socket, target: tuple[str, int]) -> None:
    """Pass on every connection until the listener is shut down."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_connect, args=(client, target), daemon=True).start()


def _connect(client: socket.socket, target: tuple[str, int]) -> None:
    with client, contextlib.suppress(OSError), socket.create_connection(target) as server:
        back = threading.Thread(target=_pump, args=(server, client), daemon=True)
        back.start()
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _ip(command: str) -> str:
    try:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise HostsUnavailableError("there is no `ip` here; install iproute2") from error
    if done.returncode != 0:
        told = done.stderr.strip()
        if "not permitted" in told or "Permission denied" in told:
            raise HostsUnavailableError(
                f"this process may not make network namespaces ({told}); it needs root with CAP_SYS_ADMIN and "
                "CAP_NET_ADMIN"
            )
        raise RuntimeError(f"`ip {command}` failed: {told}")
    return done.stdout
