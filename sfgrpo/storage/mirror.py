"""Background copy of a run's folder to an S3 bucket; `restore` downloads it again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from sfgrpo.checkpoint.snapshots import SNAPSHOTS
from sfgrpo.checkpoint.state import CHECKPOINTS, checkpoint_path, saved_updates
from sfgrpo.errors import IntegrityError
from sfgrpo.runtime.files import PARTIAL_SUFFIX
from sfgrpo.runtime.manifest import MANIFEST, manifest_digests, verify_manifest
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking.delivery import DeliveryQueue

logger = logging.getLogger(__name__)

MAX_DELAY_S = 60.0
"""Longest pause between attempts; each reads a damaged checkpoint anew."""


class Mirror:
    """Uploads a run's folder to an S3 bucket in the background, each file under its path within the folder.

    A checkpoint in the bucket has a manifest only if it is complete. Other files are uploaded before the checkpoints
    that refer to them. Checkpoints and snapshots that were pruned are removed from the bucket; other files stay.
    """

    def __init__(self, uri: str, folder: Path, encryption: str | None = None) -> None:
        """Set up the mirror without contacting the server; raise `ConfigError` for an invalid address.

        Args:
            uri: `s3://bucket/prefix`; the run is stored below it, under the folder's name.
            encryption: see `Bucket`.
        """
        self._bucket = Bucket(f"{uri.rstrip('/')}/{folder.name}", encryption)
        self._folder = folder
        self._root = folder / CHECKPOINTS
        self._uploaded: dict[str, _Stamp] = {}
        """Files known to be in the bucket with this content."""
        # Whatever the error is, training continues.
        self._queue = DeliveryQueue(self._bucket.uri, lambda error: True, MAX_DELAY_S)

    def sync(self) -> None:
        """Request an upload of the folder's present state, retried until it succeeds, and return at once."""
        # The first may have begun and missed something; the second has not, so a third would find nothing left.
        if len(self._queue) < 2:
            self._queue.put(self._upload)

    def wait(self, timeout_s: float) -> bool:
        """Wait until every requested upload is done; return whether it was within `timeout_s` seconds."""
        return self._queue.wait_until_empty(time.monotonic() + timeout_s)

    def close(self, timeout_s: float) -> None:
        """Wait as `wait` does, then drop what is left with a warning."""
        if not self.wait(timeout_s):
            logger.warning(
                "%s is incomplete after waiting %g s; the whole run is in %s", self._bucket.uri, timeout_s, self._folder
            )
            self._queue.clear()

    def _upload(self) -> None:
        """Upload what the bucket lacks, newest checkpoint first.

        The folder is listed again after each checkpoint, because training adds and prunes meanwhile. A damaged
        checkpoint raises only after all others are uploaded.
        """
        sizes = self._bucket.sizes()
        damage: IntegrityError | None = None
        tried: set[int] = set()
        while True:
            for path in self._files():
                self._put_file(path, sizes)
            newest = max(set(saved_updates(self._root)) - tried, default=None)
            if newest is None:
                break
            tried.add(newest)
            try:
                self._put_checkpoint(checkpoint_path(self._root, newest), sizes)
            except IntegrityError as error:
                damage = error
            else:
                self._prune(sizes)
        if damage is not None:
            raise damage

    def _put_checkpoint(self, path: Path, sizes: dict[str, int]) -> None:
        """Upload a checkpoint, its manifest last; one that is pruned meanwhile gets no manifest."""
        manifest = self._name(path / MANIFEST)
        try:
            # Opened first: if the checkpoint is replaced meanwhile, the old manifest does not match the new files.
            with (path / MANIFEST).open("rb") as opened:
                files = {self._name(file): file for file in path.rglob("*") if file.is_file()}
                present = {name for name in sizes if name.startswith(f"{self._name(path)}/")}
                complete = {name: sizes[name] for name in present} == {n: f.stat().st_size for n, f in files.items()}
                if complete and self._is_uploaded(manifest, opened):
                    return
                verify_manifest(path)
                for name in sorted(present & {manifest}) + sorted(present - files.keys()):
                    self._remove(name, sizes)
                digests = manifest_digests(path)
                for name in sorted(files.keys() - {manifest}):
                    self._put_file(files[name], sizes, digests[files[name].relative_to(path).as_posix()])
                self._put(manifest, opened, sizes)
        except (FileNotFoundError, IntegrityError):
            if path.exists():
                raise

    def _put_file(self, path: Path, sizes: dict[str, int], sha256: str | None = None) -> None:
        """Upload a file unless the bucket has it; skip one that was pruned or replaced just now."""
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if sizes.get(name) != _stamp(file).size or not self._is_uploaded(name, file):
                self._put(name, file, sizes, sha256)

    def _put(self, name: str, file: BufferedReader, sizes: dict[str, int], sha256: str | None = None) -> None:
        stamp = _stamp(file)
        self._bucket.put(name, file, sha256)
        self._uploaded[name], sizes[name] = stamp, stamp.size

    def _is_uploaded(self, name: str, file: BufferedReader) -> bool:
        """Return whether an existing object has the content of `file`."""
        stamp = _stamp(file)
        if self._uploaded.get(name) == stamp:
            return True
        is_same = self._bucket.sha256(name) == hashlib.file_digest(file, "sha256").hexdigest()
        if is_same:
            self._uploaded[name] = stamp
        return is_same

    def _prune(self, sizes: dict[str, int]) -> None:
        """Remove checkpoints and snapshots that the folder no longer has.

        Checkpoints newer than the folder's newest stay: this machine never had them, so it did not prune them.
        """
        for name in [name for name in sizes if name.startswith(f"{SNAPSHOTS}/")]:
            if not (self._folder / name).exists():
                self._remove(name, sizes)
        saved = saved_updates(self._root)
        matches = (re.match(rf"{CHECKPOINTS}/update-(\d+)/", name) for name in sizes)
        for update in {int(match[1]) for match in matches if match}:
            if update not in saved and update < max(saved, default=0):
                prefix = f"{self._name(checkpoint_path(self._root, update))}/"
                # The manifest first: what is half removed must not look complete.
                self._remove(f"{prefix}{MANIFEST}", sizes)
                for name in [name for name in sizes if name.startswith(prefix)]:
                    self._remove(name, sizes)

    def _remove(self, name: str, sizes: dict[str, int]) -> None:
        self._bucket.remove(name)
        sizes.pop(name, None)

    def _files(self) -> list[Path]:
        """List the files outside the checkpoints, without those that are being written."""
        return [
            path
            for path in sorted(self._folder.rglob("*"))
            if not path.is_relative_to(self._root)
            and not any(part.endswith(PARTIAL_SUFFIX) for part in path.relative_to(self._folder).parts)
            and path.is_file()
        ]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


class _Stamp(NamedTuple):
    """File attributes that change whenever the file is rewritten or replaced."""

    size: int
    modified_ns: int
    inode: int


def _stamp(file: BufferedReader) -> _Stamp:
    status = os.fstat(file.fileno())
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
