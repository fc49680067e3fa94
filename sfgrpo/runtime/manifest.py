"""SHA-256 manifests, by which a directory is verified."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

from sfgrpo.errors import IntegrityError

MANIFEST = "manifest.json"
MODEL_SUFFIXES = frozenset({".json", ".model", ".safetensors", ".txt"})
"""Endings of the files of a model: weights, configurations and vocabularies, but no card and no picture."""


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text, as UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(directory: Path) -> Path:
    """Write `manifest.json` with the SHA-256 and the size in bytes of every other file below `directory`."""
    files = {
        name: {"sha256": sha256_of_file(path), "size": path.stat().st_size}
        for name, path in sorted(_files_of(directory).items())
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    return manifest


def verify_manifest(directory: Path) -> None:
    """Compare every file below `directory` with the manifest.

    Raises:
        IntegrityError: A file is changed, missing, unreadable or not listed, or the manifest itself is.
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
    """Return the SHA-256 of every file below `directory`, by relative name, as its manifest has it."""
    files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def model_digest(directory: Path) -> str:
    """Return the SHA-256 of a model: of the names and digests of all its weights, configurations and vocabularies.

    Links are followed, as libraries do; hidden folders, such as the hub's `.cache`, and the manifest are left out.
    """
    lines = []
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in names):
            if path.suffix in MODEL_SUFFIXES and path.name != MANIFEST:
                state = path.stat()
                digest = _sha256_of_state(path.resolve(), state.st_size, state.st_mtime_ns)
                lines.append(f"{path.relative_to(directory).as_posix()} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@functools.cache
def _sha256_of_state(path: Path, size: int, modified_ns: int) -> str:
    """Return the SHA-256 of a file as it stood then: a process asks several times for that of the same gigabytes."""
    return sha256_of_file(path)


def _read_manifest(manifest: Path) -> dict[str, str]:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {name: _describe(entry["sha256"], entry["size"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = "no file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise IntegrityError(manifest, "a manifest of the files beside it", found) from error


def _files_of(directory: Path) -> dict[str, Path]:
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    files.pop(MANIFEST, None)
    return files


def _content_of(path: Path) -> str:
    try:
        return _describe(sha256_of_file(path), path.stat().st_size)
    except OSError as error:
        return f"an unreadable file ({error.strerror})"


def _describe(sha256: str, size: int) -> str:
    return f"sha256 {sha256} of {size} bytes"
