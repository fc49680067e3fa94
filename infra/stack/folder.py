"""Files of a stack, their permissions, and the lock on starting and stopping it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from infra.stack.errors import StackError
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.locks import lock_existing

MAX_SOCKET_LENGTH = 89
"""Of supervisord's socket, in bytes; Linux allows 107. Python's multiprocessing makes sockets whose names are longer by
18, in the folder of temporary files."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The files of a stack below its folder, an absolute path."""

    root: Path

    @property
    def env(self) -> Path:
        """Shell script that sets the environment of clients; holds secrets."""
        return self.root / "env"

    @property
    def secrets(self) -> Path:
        """All secrets, as JSON."""
        return self.root / "secrets.json"

    @property
    def settings(self) -> Path:
        """The settings with which the stack was last started, as JSON."""
        return self.root / "settings.json"

    @property
    def configuration(self) -> Path:
        """Configuration of supervisord."""
        return self.root / "supervisord.conf"

    @property
    def private(self) -> Path:
        """Folder of supervisord's socket, process id and log."""
        return self.root / "supervisor"

    @property
    def socket(self) -> Path:
        """Socket of supervisord."""
        return self.private / "socket"

    @property
    def temporary(self) -> Path:
        """Folder of the flow runs' temporary files; in the one that all users share Prefect takes a name that anybody
        may have taken before."""
        return self.root / "tmp"

    @property
    def logs(self) -> Path:
        """Folder of the programs' logs."""
        return self.root / "logs"

    def log(self, program: str) -> Path:
        """Output of a program."""
        return self.logs / f"{program}.log"

    def data(self, program: str) -> Path:
        """Folder of a program's data."""
        return self.root / "data" / program

    def make_data(self, program: str) -> Path:
        """Make the folder of a program's data, if need be, and return it."""
        folder = self.data(program)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def open_folder(root: Path) -> Folder:
    """Return the folder without making it; raise `ConfigError` for a path that supervisord cannot use."""
    folder = Folder(root=root.absolute())
    if "%" in str(folder.root):
        raise ConfigError(
            f"STACK_DIR {folder.root} has a percent sign, which supervisord takes for a variable; rename it"
        )
    if (length := len(os.fsencode(folder.socket))) > MAX_SOCKET_LENGTH:
        raise ConfigError(
            f"the path of the socket {folder.socket} has {length} bytes, and the system allows {MAX_SOCKET_LENGTH}; "
            "set STACK_DIR to a shorter one"
        )
    return folder


def make_folder(folder: Folder) -> None:
    """Make the folder and its subfolders.

    Other users can read nothing. When root runs the stack, PostgreSQL's user can pass through to its own data.
    """
    passage = 0o711 if os.geteuid() == 0 else 0o700
    for path, mode in (
        (folder.root, passage),
        (folder.root / "data", passage),
        (folder.private, 0o700),
        (folder.logs, 0o700),
        (folder.temporary, 0o700),
    ):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)


@contextlib.contextmanager
def start_stop_lock(folder: Folder) -> Iterator[None]:
    """Keep others from starting or stopping the stack; raise `StackError` if somebody is doing so already."""
    with lock_existing(folder.private) as is_locked:
        if is_locked is False:
            raise StackError(f"the stack in {folder.root} is being started or stopped; wait until that is done")
        yield
