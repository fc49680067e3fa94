"""Lock files, released by the kernel when a process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_POLL_S = 0.2


@contextlib.contextmanager
def exclusive_lock(lock: Path, timeout_s: float = 0.0) -> Iterator[bool]:
    """Takes a lock file, for which it waits up to `timeout_s` seconds; tells whether it has it.

    The file stays, and the lock goes with the process. Where the file system has no locks, everybody has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _taken(descriptor, time.monotonic() + timeout_s)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_POLL_S)
        except OSError:
            return True
        else:
            return True


@contextlib.contextmanager
def _locked(path: Path, kind: int, *, wait: bool = False) -> Iterator[bool]:
    """Tries to lock a file or directory, and tells whether it could.

    The kernel drops the lock with the process, however that dies. A process id in the name would not do: ids are
    reused, and mean nothing in another container.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
