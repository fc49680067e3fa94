"""Definition of a program of the stack."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from infra.stack.credentials import Secrets
from infra.stack.folder import Folder
from infra.stack.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
BIN = Path(sys.executable).parent
"""Folder of the executables of the virtual environment."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Settings, folder and secrets of a stack, whether it runs or not."""

    settings: Settings
    folder: Folder
    secrets: Secrets


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Command that `python -m infra.stack run` replaces itself by."""

    command: list[str]
    environment: dict[str, str]
    """Variables besides those of the machine."""
    working_directory: Path
    user: str | None = None
    """User of the program; None for the user who runs the stack."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program of the stack."""

    name: str
    launch: Callable[[Stack], Launch]
    """Prepares the program's files and returns its command."""
    address: Callable[[Stack], str]
    """Returns the address at which users and clients reach the program."""
    check: Callable[[Stack], None] = lambda stack: None
    """Raises `UnhealthyError` unless the program answers a request."""
    last_heartbeat: Callable[[Stack], float] = lambda stack: math.inf
    """Returns the time of the last heartbeat that the program sent, in seconds since 1970. One older than the process
    is of an earlier process."""
    require: Callable[[Folder], None] = lambda folder: None
    """Raises `StackError` or `ConfigError` for what is missing on this machine; changes nothing."""
    initialise: Callable[[Stack], None] = lambda stack: None
    """Creates what dependent programs expect in a healthy program, such as databases; idempotent."""
    port: str | None = None
    """Variable of the port on which it listens."""
    needs: tuple[str, ...] = ()
    """Programs that have to be healthy first."""
    keeps_children: bool = False
    """Whether its children keep running when it is killed. Those of other programs would block the next start."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: int = 20
    """Seconds between that signal and SIGKILL."""
