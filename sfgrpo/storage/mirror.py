"""Background copy of a run's folder to an S3 bucket; `restore` downloads it again."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sfgrpo.checkpoint.snapshots import SNAPSHOTS
from sfgrpo.checkpoint.state import CHECKPOINTS, checkpoint_path, saved_updates
from sfgrpo.errors import IntegrityError, SfgrpoError
from sfgrpo.runtime.files import PARTIAL_SUFFIX
from sfgrpo.runtime.manifest import MANIFEST, manifest_digests, verify_manifest
from sfgrpo.storage.parts import sha256_of
from sfgrpo.storage.s3 import Bucket

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


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
        self._state = threading.Condition()
        self._num_requests = 0
        self._num_done = 0
        self._retry_now = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def sync(self) -> None:
        """Request an upload of the folder's present state and return at once.

        A failing bucket raises nothing: the upload is retried until it succeeds, with one warning. Does nothing after
        `close`.
        """
        with self._state:
            self._num_requests += 1
            self._state.notify_all()
            if self._thread is None:
                # A daemon, since a server that hangs must not keep the process from ending.
                name = f"mirror of {self._folder.name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until every requested upload is done; return whether it was within `timeout_s` seconds."""
        with self._state:
            requested = self._num_requests
            self._retry_now = True
            self._state.notify_all()
            return self._state.wait_for(lambda: self._num_done >= requested, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Wait as `wait` does, warn if something is still missing, and stop the background thread."""
        if not self.wait(timeout_s):
            logger.warning(
                "%s is incomplete after waiting %g s; the whole run is in %s", self._bucket.uri, timeout_s, self._folder
            )
        with self._state:
            self._closed = True
            self._state.notify_all()

    def _run(self) -> None:
        """Upload whenever requested, until closed; retry failures with growing pauses."""
        pauses = _pauses()
        failing_since: float | None = None
        while (requested := self._next_request()) is not None:
            try:
                self._upload()
            except Exception as error:  # whatever it is, training continues
                if failing_since is None and not self._closed:
                    failing_since = time.monotonic()
                    reason = str(error) if isinstance(error, SfgrpoError) else f"{type(error).__name__}: {error}"
                    logger.warning("mirroring failed and is retried until it succeeds: %s", reason)
                if self._pause(next(pauses)):
                    pauses = _pauses()
                continue
            if failing_since is not None:
                logger.warning(
                    "%s is up to date again after %.0f s", self._bucket.uri, time.monotonic() - failing_since
                )
                pauses, failing_since = _pauses(), None
            with self._state:
                self._num_done = requested
                self._state.notify_all()

    def _next_request(self) -> int | None:
        """Wait for a request; return the number of requests so far, or None after `close`."""
        with self._state:
            self._state.wait_for(lambda: self._closed or self._num_requests > self._num_done)
            return None if self._closed else self._num_requests

    def _pause(self, pause_s: float) -> bool:
        """Pause after a failure; return whether `wait` or `close` cut the pause short."""
        with self._state:
            cut_short = self._state.wait_for(lambda: self._closed or self._retry_now, pause_s)
            self._retry_now = False
            return cut_short

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

    def _put(self, name: str, file: BinaryIO, sizes: dict[str, int], sha256: str | None = None) -> None:
        stamp = _stamp(file)
        self._bucket.put(name, file, sha256)
        self._uploaded[name], sizes[name] = stamp, stamp.size

    def _is_uploaded(self, name: str, file: BinaryIO) -> bool:
        """Return whether an existing object has the content of `file`."""
        if self._uploaded.get(name) != _stamp(file) and self._bucket.sha256(name) == sha256_of(file):
            self._uploaded[name] = _stamp(file)
        return self._uploaded.get(name) == _stamp(file)

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


def _stamp(file: BinaryIO) -> _Stamp:
    status = os.fstat(file.fileno())
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def _pauses() -> Iterator[float]:
    """Yield pauses in seconds that double, with jitter so that many runs do not retry in step."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)
