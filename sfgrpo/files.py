"""Files that appear whole or not at all, and manifests that tell whether they are still what was written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sfgrpo.errors import IntegrityError

MANIFEST = "manifest.json"
PARTIAL_SUFFIX = ".partial"
LOCK_POLL_S = 0.2


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends and vanishes when it raises.

    All content is on the disk before the name appears. A directory already at `path` is replaced: a crash exactly
    between the two renames leaves none. What dead writers left beside `path` is removed first.
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
    """Writes a file, text as UTF-8, that is seen either as it was before or complete."""
    with _partial_beside(path, Path.touch) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _synchronise(partial)
        partial.replace(path)
    _synchronise(path.parent)


@contextlib.contextmanager
def temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    """Gives an empty directory below `parent` which vanishes with the block; those of dead processes vanish first."""
    with _partial_beside(parent / name, Path.mkdir) as partial:
        try:
            yield partial
        finally:
            _remove(partial)


def remove_directory(path: Path) -> None:
    """Removes a directory, whose name is gone before its content: it is never seen half removed."""
    partial = _partial_name(path)
    path.rename(partial)
    _remove(partial)


def remove_leftovers(parent: Path) -> None:
    """Removes what writers in `parent` left behind when they were killed; those at work are left alone.

    Where the file system has no such locks, nothing is removed.
    """
    with _locked(parent, fcntl.LOCK_EX) as no_writer_is_starting:
        for partial in parent.glob(f".*{PARTIAL_SUFFIX}") if no_writer_is_starting else ():
            with contextlib.suppress(FileNotFoundError), _locked(partial, fcntl.LOCK_EX) as writer_is_dead:
                if writer_is_dead:
                    _remove(partial)


@contextlib.contextmanager
def only_user(lock: Path, timeout_s: float = 0.0) -> Iterator[bool]:
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


def sha256_of_file(path: Path) -> str:
    """Gives the SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> Path:
    """Writes `manifest.json` with the SHA-256 and the size in bytes of every other file below `directory`."""
    files = {
        name: {"sha256": sha256_of_file(path), "size": path.stat().st_size}
        for name, path in sorted(_files_of(directory).items())
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    return manifest


def verify_manifest(directory: Path) -> None:
    """Compares every file below `directory` with its manifest.

    Raises `IntegrityError` for the first file that is changed, missing, unreadable or not listed, and for a manifest
    that is itself missing or unreadable.
    """
    listed = _read_manifest(directory / MANIFEST)
    present = _files_of(directory)
    for name, expected in listed.items():
        found = _content_of(directory / name) if name in present else "no file"
        if found != expected:
            raise IntegrityError(directory / name, expected, found)
    for name in sorted(present.keys() - listed.keys()):
        raise IntegrityError(directory / name, "no file", _content_of(present[name]))


def manifest_digests(directory: Path) -> dict[str, str]:
    """Gives the SHA-256 of every file below `directory` as its manifest has it, by relative names."""
    files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def _read_manifest(manifest: Path) -> dict[str, str]:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {name: _worded(entry["sha256"], entry["size"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = "no file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise IntegrityError(manifest, "a manifest of the files beside it", found) from error


def _files_of(directory: Path) -> dict[str, Path]:
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    files.pop(MANIFEST, None)
    return files


def _content_of(path: Path) -> str:
    try:
        return _worded(sha256_of_file(path), path.stat().st_size)
    except OSError as error:
        return f"an unreadable file ({error.strerror})"


def _worded(sha256: str, size: int) -> str:
    return f"sha256 {sha256} of {size} bytes"


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def _partial_beside(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Creates and locks a partial file or directory, which is removed when the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    partial = _partial_name(path)
    with contextlib.ExitStack() as lock:
        # Until it is locked it looks like a leftover, so nobody may clean up in between.
        with _locked(path.parent, fcntl.LOCK_SH, wait=True):
            create(partial)
            lock.enter_context(_locked(partial, fcntl.LOCK_EX))
        try:
            yield partial
        except BaseException:
            _remove(partial)
            raise


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


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
