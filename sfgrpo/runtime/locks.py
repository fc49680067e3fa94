"""Advisory locks on files and directories, which the kernel releases when a process dies.

The package filelock would not do: it has no locks on directories, and where flock is missing it falls back to marker
files, which outlive a killed process. Process ids in files are reused, and mean nothing in another container.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_POLL_S = 0.2


@contextlib.contextmanager
def exclusive_lock(path: Path, timeout_s: float = 0.0) -> Iterator[bool]:
    """Lock a file, which is made if need be and stays; wait up to `timeout_s` seconds, and yield whether it is locked.

    Where the file system has no locks, everybody gets this one.
    """
    _make_file(path)
    with lock_existing(path, timeout_s=timeout_s) as locked:
        yield locked is not False


@contextlib.contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Share the lock of a file, which is made if need be and stays, with others that share it; wait for it."""
    _make_file(path)
    with lock_existing(path, shared=True, timeout_s=math.inf):
        yield


@contextlib.contextmanager
def lock_existing(path: Path, *, shared: bool = False, timeout_s: float = 0.0) -> Iterator[bool | None]:
    """Lock a file or directory, waiting up to `timeout_s` seconds; yield whether, None where locks do not exist."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout_s)
    finally:
        os.close(descriptor)


def _make_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _lock(descriptor: int, kind: int, timeout_s: float) -> bool | None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind if timeout_s == math.inf else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_POLL_S)
        except OSError:
            return None
        else:
            return True
