"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sfgrpo.runtime.locks import lock_existing

PARTIAL_SUFFIX = ".partial"
PARTIALS = f".*{PARTIAL_SUFFIX}"


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends, and is removed when it raises.

    All content is on the disk before the name appears. An existing directory at `path` is replaced; a crash exactly
    between the two renames leaves none. What killed writers left beside `path` is removed first.
    """
    with _partial_beside(path, Path.mkdir) as partial:
        yield partial
        for file in (*partial.rglob("*"), partial):
            _synchronise(file)
        if path.exists():
            remove_directory(path)
        partial.rename(path)
    _synchronise(path.parent)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8; a reader sees the old content or all of the new one."""
    with _partial_beside(path, Path.touch) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _synchronise(partial)
        partial.replace(path)
    _synchronise(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, as `atomic_write` does."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty directory in `parent`, removed with the block; those of killed processes are removed first."""
    with _partial_beside(parent / name, Path.mkdir) as partial:
        try:
            yield partial
        finally:
            _remove(partial)


def remove_directory(path: Path) -> None:
    """Remove a directory; it is renamed first, so that nobody sees it half removed."""
    partial = _partial_name(path)
    path.rename(partial)
    _remove(partial)


def remove_partials(parent: Path) -> None:
    """Remove what killed writers left in `parent`; where the file system has no locks, nothing is removed."""
    with lock_existing(parent) as no_writer_starts:
        for partial in parent.glob(PARTIALS) if no_writer_starts else ():
            with contextlib.suppress(FileNotFoundError), lock_existing(partial) as writer_is_dead:
                if writer_is_dead:
                    _remove(partial)


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def _partial_beside(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Create and lock a partial file or directory, which is removed when the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    partial = _partial_name(path)
    with contextlib.ExitStack() as lock:
        # Until it is locked it looks like that of a killed writer, so nobody may clean up in between. In a directory
        # that is partial itself nobody does: its writer holds the lock, and would wait for itself here.
        is_nested = path.parent.resolve().match(PARTIALS)
        with contextlib.nullcontext() if is_nested else lock_existing(path.parent, shared=True, timeout_s=math.inf):
            create(partial)
            lock.enter_context(lock_existing(partial))
        try:
            yield partial
        except BaseException:
            _remove(partial)
            raise


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
