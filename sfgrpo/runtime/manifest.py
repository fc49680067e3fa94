"""SHA-256 manifests that prove a directory is what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sfgrpo.errors import IntegrityError

MANIFEST = "manifest.json"


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
