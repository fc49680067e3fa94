"""The folder of a run kept in an S3 bucket as well, from where a bare machine takes the run up again.

An object lies at the path of its file, below the prefix and the folder's name. What a file's object holds is proven
after each upload: the server's size, and its ETag where that is the MD5 that S3 defines; where it is something else,
under encryption by KMS say, the object is read back and compared by SHA-256. That SHA-256 stays with the object as
metadata, and every download is checked against it.

The endpoint, the region and the credentials are those of the standard AWS variables and files; encryption at rest is
the bucket's own setting. A killed writer may leave parts of an upload that nobody lists: a lifecycle rule of the
bucket should abort incomplete multipart uploads.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from sfgrpo.checkpoint import latest_checkpoint
from sfgrpo.errors import ConfigError, IntegrityError, MirrorError
from sfgrpo.files import MANIFEST, PARTIAL_SUFFIX, atomic_directory, atomic_write, verify_manifest

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PART_SIZE = 16 * 2**20
"""Bytes of a part; files of at least this size go up in parts."""
NUM_ATTEMPTS = 5
"""Tries of one request, with growing pauses of some 15 seconds together, before it counts as failed."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0

CREDENTIALS_CURE = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they are allowed to do"
REFUSALS = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
ABSENT = {"404", "NoSuchKey"}


class Mirror:
    """Copies a run's folder to an S3 bucket in the background, and back.

    Each checkpoint directory below `checkpoints/` is whole in the bucket, or has no manifest there. All other files
    of the folder go up before the checkpoints, so that whoever finds a checkpoint finds what it refers to. Checkpoints
    that were pruned leave the bucket; other files stay.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        """Takes `s3://bucket/prefix`; raises `ConfigError` for anything else, and contacts nobody."""
        self._bucket = _Bucket(uri, f"{folder.name}/")
        self._folder = folder
        self._known: dict[str, _Stamp] = {}
        """The files of which the bucket is known to have the content, by path."""
        self._state = threading.Condition()
        self._num_asked = 0
        self._num_done = 0
        self._hurried = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def sync(self) -> None:
        """Asks for the bucket to be brought up to the folder's present state, and returns at once.

        Never raises on account of the bucket: as long as it does not work, it is tried again, with one warning.
        """
        with self._state:
            self._num_asked += 1
            self._state.notify_all()
        if self._thread is None:
            # A daemon, since a server that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name=f"mirror of {self._folder.name}", daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Waits until all that was asked for is in the bucket; False when it is not after `timeout_s` seconds."""
        with self._state:
            asked = self._num_asked
            self._hurried = True
            self._state.notify_all()
            return self._state.wait_for(lambda: self._num_done >= asked, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Waits as `wait` does, warns of what could not be uploaded in time, and ends the background work."""
        if not self.wait(timeout_s):
            logger.warning(
                "run %s is not up to date in %s after waiting for %g s; the folder %s has all of it",
                self._folder.name,
                self._bucket.uri,
                timeout_s,
                self._folder,
            )
        with self._state:
            self._closed = True
            self._state.notify_all()

    def restore(self) -> bool:
        """Brings back the newest whole checkpoint, unless the folder has one as new, and absent files; tells if any.

        With a newer checkpoint come all other files as they are in the bucket, as they belong together. A checkpoint
        that is not what its manifest says is skipped with a warning. Raises `MirrorError` when the bucket does not
        exist, refuses, or cannot be reached.
        """
        try:
            objects = self._bucket.sizes()
            came = self._restore_checkpoint(objects)
            return self._restore_files(objects, replace=False) or came
        except _s3_errors() as error:
            raise self._bucket.failure(error) from error

    def _work(self) -> None:
        broken_since: float | None = None
        pauses = _pauses()
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._num_asked > self._num_done)
                if self._closed:
                    return
                asked = self._num_asked
            try:
                self._upload()
            except Exception as error:  # whatever it is, training goes on, and so does the next try
                if broken_since is None:
                    broken_since = time.monotonic()
                    logger.warning(
                        "run %s is not mirrored for the moment, which is tried again until it works: %s",
                        self._folder.name,
                        self._bucket.failure(error),
                    )
                with self._state:
                    if self._state.wait_for(lambda: self._closed or self._hurried, next(pauses)):
                        pauses = _pauses()
                    self._hurried = False
                continue
            if broken_since is not None:
                logger.warning(
                    "run %s is mirrored to %s again, after %.0f s",
                    self._folder.name,
                    self._bucket.uri,
                    time.monotonic() - broken_since,
                )
            broken_since, pauses = None, _pauses()
            with self._state:
                self._num_done = asked
                self._state.notify_all()

    def _upload(self) -> None:
        """Brings the bucket up to the folder, newest checkpoint first.

        Looks again after each checkpoint for what training has added or pruned meanwhile. Raises the first failure,
        a damaged checkpoint only after all others are there.
        """
        objects = self._bucket.sizes()
        damage: IntegrityError | None = None
        handled: set[str] = set()
        while True:
            for path in self._files():
                self._put_file(path, objects)
            local = self._local_checkpoints()
            waiting = [name for name in reversed(local) if name not in handled]
            if not waiting:
                break
            handled.add(waiting[0])
            try:
                self._put_checkpoint(waiting[0], objects)
            except IntegrityError as error:
                damage = damage or (error if (self._folder / CHECKPOINTS / waiting[0]).exists() else None)
            else:
                self._prune(objects)
        if damage is not None:
            raise damage

    def _put_checkpoint(self, name: str, objects: dict[str, int]) -> None:
        """Uploads a checkpoint, its manifest last; one that vanishes or is replaced meanwhile is left without."""
        path = self._folder / CHECKPOINTS / name
        inside = f"{CHECKPOINTS}/{name}/"
        try:
            files = {f"{inside}{file.relative_to(path).as_posix()}": file for file in path.rglob("*") if file.is_file()}
            manifest = f"{inside}{MANIFEST}"
            stamps = {key: _stamp(file) for key, file in files.items()}
            sizes = {key: objects.get(key) for key in files}
            if all(self._known.get(key) == stamp and sizes[key] == stamp.size for key, stamp in stamps.items()):
                return
            verify_manifest(path)
            present = {key for key in objects if key.startswith(inside)}
            whole = present == files.keys() and all(sizes[key] == stamp.size for key, stamp in stamps.items())
            if not whole or not self._has(manifest, files[manifest]):
                for key in sorted(present - files.keys() | present & {manifest}, key=_manifest_first):
                    self._bucket.remove(key, objects)
                for key in sorted(files.keys() - {manifest}):
                    self._put_file(files[key], objects)
                if {key: _stamp(file) for key, file in files.items()} != stamps:
                    return
                self._put_file(files[manifest], objects)
            self._known |= stamps
        except (FileNotFoundError, IntegrityError):
            if path.exists():
                raise

    def _put_file(self, path: Path, objects: dict[str, int]) -> None:
        """Uploads a file unless the bucket has it; one that has vanished was pruned or replaced, and is let go."""
        key = path.relative_to(self._folder).as_posix()
        try:
            with path.open("rb") as file:
                stamp = _stamp_of(file)
                if objects.get(key) == stamp.size and (self._known.get(key) == stamp or self._has(key, path)):
                    self._known[key] = stamp
                    return
                self._bucket.put(key, file)
        except FileNotFoundError:
            return
        objects[key] = stamp.size
        self._known[key] = stamp

    def _has(self, key: str, path: Path) -> bool:
        """Tells whether an object was made from a file with this content."""
        with path.open("rb") as file:
            return self._bucket.sha256(key) == _digests(file).sha256

    def _prune(self, objects: dict[str, int]) -> None:
        """Removes checkpoints that the folder no longer has, the manifest first; those after its newest stay."""
        local = self._local_checkpoints()
        gone = [name for name in _checkpoints(objects) if local and name not in local and _older(name, local[-1])]
        for key in sorted(objects, key=_manifest_first):
            if key.startswith(tuple(f"{CHECKPOINTS}/{name}/" for name in gone)):
                self._bucket.remove(key, objects)
                self._known.pop(key, None)

    def _restore_checkpoint(self, objects: Mapping[str, int]) -> bool:
        root = self._folder / CHECKPOINTS
        try:
            newest = latest_checkpoint(root)
        except IntegrityError:
            newest = None  # all of them are damaged, and the bucket may have better ones
        for name in reversed(_checkpoints(objects)):
            inside = f"{CHECKPOINTS}/{name}/"
            if newest is not None and not _older(newest.name, name):
                break
            if f"{inside}{MANIFEST}" not in objects:
                continue  # its upload never came to an end
            try:
                with atomic_directory(root / name) as partial:
                    for key in sorted(key for key in objects if key.startswith(inside)):
                        self._fetch(key, _below(partial, key.removeprefix(inside)))
                    verify_manifest(partial)
                    # Before the checkpoint appears, so that a crash in between leaves none without its files.
                    self._restore_files(objects, replace=True)
            except (IntegrityError, _Absent) as error:
                logger.warning("checkpoint %s in %s is skipped: %s", name, self._bucket.uri, error)
            else:
                logger.info("checkpoint %s came from %s", name, self._bucket.uri)
                return True
        return False

    def _restore_files(self, objects: Mapping[str, int], *, replace: bool) -> bool:
        """Downloads the files outside the checkpoints that are absent or, with `replace`, differ; tells if any."""
        came = False
        for key in sorted(key for key in objects if not key.startswith(f"{CHECKPOINTS}/")):
            path = _below(self._folder, key)
            if path.exists() and not (replace and not self._has(key, path)):
                continue
            try:
                content = self._bucket.get(key)
            except (IntegrityError, _Absent) as error:
                logger.warning("%s stays as it is: %s", path, error)
            else:
                atomic_write(path, content)
                came = True
        return came

    def _fetch(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._bucket.get(key))

    def _files(self) -> list[Path]:
        """Lists what is outside the checkpoints, without the files that are being written."""
        parts = ((path, path.relative_to(self._folder).parts) for path in sorted(self._folder.rglob("*")))
        return [
            path
            for path, names in parts
            if names[0] != CHECKPOINTS and not any(name.endswith(PARTIAL_SUFFIX) for name in names) and path.is_file()
        ]

    def _local_checkpoints(self) -> list[str]:
        """Names the checkpoints of the folder, oldest first."""
        names = (path.name for path in (self._folder / CHECKPOINTS).glob("update-*"))
        return sorted(filter(_update_index.__call__, names), key=_update_index)
