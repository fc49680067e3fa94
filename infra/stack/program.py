"""What the stack has to know of a program to run it."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from infra.stack.folder import Folder
from infra.stack.secrets import Secrets
from infra.stack.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
BIN = Path(sys.executable).parent
"""Folder of the programs of our packages."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack as it is set up; says nothing of whether it runs."""

    settings: Settings
    folder: Folder
    secrets: Secrets


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What `run` becomes."""

    command: list[str]
    environment: dict[str, str]
    """Variables beside those of the machine."""
    working_directory: Path
    user: str | None = None
    """Whom the program runs as; None means whoever runs the stack."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program of the stack; its functions take the stack, unless they say otherwise."""

    name: str
    launch: Callable[[Stack], Launch]
    """Prepares what lies on the disk, and says what to execute."""
    check: Callable[[Stack, float], None]
    """Asks the program to do what it is for; raises `UnhealthyError`. Takes the time of its start, as seconds since
    1970."""
    address: Callable[[Stack], str]
    """What to open or to connect to."""
    require: Callable[[Folder], None] = lambda folder: None
    """Raises `StackError` or `ConfigError` for what is missing on this machine; changes nothing. Takes the folder."""
    fill: Callable[[Stack], None] = lambda stack: None
    """Makes what those who need the program expect in it, once it is healthy; harmless when done again."""
    port: str | None = None
    """Variable of the port on which it listens."""
    needs: tuple[str, ...] = ()
    """Programs that have to be healthy first."""
    children_outlive: bool = False
    """Whether its children go on when it is killed, rather than be in the way of its next start."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: int = 20
    """Seconds between that signal and SIGKILL."""
