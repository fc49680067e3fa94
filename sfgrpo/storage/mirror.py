"""The folder of a run kept in an S3 bucket as well, from where a bare machine takes the run up again."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sfgrpo.checkpoint.snapshots import SNAPSHOTS
from sfgrpo.checkpoint.state import CHECKPOINTS, checkpoint_path, latest_checkpoint
from sfgrpo.errors import IntegrityError, MirrorError, SfgrpoError
from sfgrpo.runtime.files import PARTIAL_SUFFIX, atomic_directory
from sfgrpo.runtime.manifest import MANIFEST, manifest_digests, verify_manifest
from sfgrpo.storage.s3 import Bucket, ObjectAbsentError, sha256_of

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


class Mirror:
    """Copies a run's folder to an S3 bucket in the background, and back; an object lies at the path of its file.

    A checkpoint below `checkpoints/` is whole in the bucket, or has no manifest there. All other files of the folder
    go up before the checkpoints, so that whoever finds a checkpoint finds what it refers to. Checkpoints and snapshots
    that were pruned leave the bucket; other files stay.
    """

    def __init__(self, uri: str, folder: Path, encryption: str | None = None) -> None:
        """Takes `s3://bucket/prefix`, below which the objects lie under the folder's name; contacts nobody.

        `encryption` is that of `Bucket`.

        Raises `ConfigError` for what is no such address.
        """
        self._bucket = Bucket(f"{uri.rstrip('/')}/{folder.name}", encryption)
        self._folder = folder
        self._root = folder / CHECKPOINTS
        self._sent: dict[str, _Stamp] = {}
        """The files of which the bucket is known to have the content."""
        self._state = threading.Condition()
        self._num_asked = 0
        self._num_done = 0
        self._hurried = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def sync(self) -> None:
        """Asks for the bucket to be brought up to the folder's present state, and returns at once.

        Raises nothing on account of the bucket: while that does not work it is tried again and again, with one
        warning. After `close` it does nothing.
        """
        with self._state:
            self._num_asked += 1
            self._state.notify_all()
            if self._thread is None:
                # A daemon, since a server that hangs must not keep the process from ending.
                name = f"mirror of {self._folder.name}"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Waits until all that was asked for is in the bucket; False when it is not after `timeout_s` seconds."""
        with self._state:
            asked = self._num_asked
            self._hurried = True
            self._state.notify_all()
            return self._state.wait_for(lambda: self._num_done >= asked, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Waits as `wait` does, warns when something is missing after that, and ends the background work."""
        if not self.wait(timeout_s):
            logger.warning(
                "%s is behind the run after %g s of waiting; all of it is in %s",
                self._bucket.uri,
                timeout_s,
                self._folder,
            )
        with self._state:
            self._closed = True
            self._state.notify_all()

    def restore(self) -> bool:
        """Downloads the newest whole checkpoint, if newer than the folder's newest, and absent files; tells if any.

        With the checkpoint come all other files as they are in the bucket, because they belong together. A
        checkpoint that is not what its manifest says is skipped with a warning. Raises `MirrorError` when the bucket
        does not exist, refuses or cannot be reached.
        """
        sizes = self._bucket.sizes()
        came = self._restore_checkpoint(sizes)
        return self._restore_files(sizes, replace=False) or came

    def _work(self) -> None:
        pauses = _pauses()
        broken_since: float | None = None
        while (asked := self._next_request()) is not None:
            try:
                self._upload()
            except Exception as error:  # whatever it is, training goes on
                if broken_since is None and not self._closed:
                    broken_since = time.monotonic()
                    reason = str(error) if isinstance(error, SfgrpoError) else f"{type(error).__name__}: {error}"
                    logger.warning("the run is not mirrored now, which is tried until it works: %s", reason)
                if self._rest(next(pauses)):
                    pauses = _pauses()
                continue
            if broken_since is not None:
                logger.warning("%s is up to date again after %.0f s", self._bucket.uri, time.monotonic() - broken_since)
                pauses, broken_since = _pauses(), None
            with self._state:
                self._num_done = asked
                self._state.notify_all()

    def _next_request(self) -> int | None:
        """Waits for something to do; gives the number of requests that are met by it, or None after `close`."""
        with self._state:
            self._state.wait_for(lambda: self._closed or self._num_asked > self._num_done)
            return None if self._closed else self._num_asked

    def _rest(self, pause_s: float) -> bool:
        """Waits after a failure; tells whether somebody who waits for the bucket cut it short."""
        with self._state:
            hurried = self._state.wait_for(lambda: self._closed or self._hurried, pause_s)
            self._hurried = False
            return hurried

    def _upload(self) -> None:
        """Brings the bucket up to the folder, newest checkpoint first.

        Looks again after each checkpoint for what training has added or pruned. A damaged checkpoint is an error, but
        only once all others are there.
        """
        sizes = self._bucket.sizes()
        damage: IntegrityError | None = None
        tried: set[int] = set()
        while True:
            for path in self._files():
                self._put_file(path, sizes)
            newest = max(self._saved_updates() - tried, default=None)
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
        """Uploads a checkpoint, its manifest last; one that is pruned meanwhile is left without."""
        manifest = self._name(path / MANIFEST)
        try:
            # Opened first: should the checkpoint be replaced now, its manifest is the old one, and shows the mixture.
            with (path / MANIFEST).open("rb") as opened:
                files = {self._name(file): file for file in path.rglob("*") if file.is_file()}
                present = {name for name in sizes if name.startswith(f"{self._name(path)}/")}
                complete = {name: sizes[name] for name in present} == {n: f.stat().st_size for n, f in files.items()}
                if complete and self._is_sent(manifest, opened):
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
        """Uploads a file unless the bucket has it; one that has just been pruned or replaced is left out."""
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if sizes.get(name) != _stamp(file).size or not self._is_sent(name, file):
                self._put(name, file, sizes, sha256)

    def _put(self, name: str, file: BinaryIO, sizes: dict[str, int], sha256: str | None = None) -> None:
        stamp = _stamp(file)
        self._bucket.put(name, file, sha256)
        self._sent[name], sizes[name] = stamp, stamp.size

    def _is_sent(self, name: str, file: BinaryIO) -> bool:
        """Tells whether the object, which exists, was made of this very content."""
        if self._sent.get(name) != _stamp(file) and self._bucket.sha256(name) == sha256_of(file):
            self._sent[name] = _stamp(file)
        return self._sent.get(name) == _stamp(file)

    def _prune(self, sizes: dict[str, int]) -> None:
        """Removes checkpoints and snapshots that the folder no longer has.

        Checkpoints after its newest were never its to prune.
        """
        for name in [name for name in sizes if name.startswith(f"{SNAPSHOTS}/")]:
            if not (self._folder / name).exists():
                self._remove(name, sizes)
        saved = self._saved_updates()
        for update in _updates_in(sizes):
            if update not in saved and update < max(saved, default=0):
                folder = self._name(checkpoint_path(self._root, update))
                # Its manifest first: what is half removed must not look whole.
                self._remove(f"{folder}/{MANIFEST}", sizes)
                for name in [name for name in sizes if name.startswith(f"{folder}/")]:
                    self._remove(name, sizes)

    def _remove(self, name: str, sizes: dict[str, int]) -> None:
        self._bucket.remove(name)
        sizes.pop(name, None)

    def _restore_checkpoint(self, sizes: Mapping[str, int]) -> bool:
        newest = self._newest_intact()
        for update in sorted(_updates_in(sizes), reverse=True):
            path = checkpoint_path(self._root, update)
            if update <= newest:
                break
            if self._name(path / MANIFEST) not in sizes:
                continue  # its upload has not come to an end
            try:
                with atomic_directory(path) as partial:
                    for name in sorted(name for name in sizes if name.startswith(f"{self._name(path)}/")):
                        file = partial / (self._folder / name).relative_to(path)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with file.open("wb") as opened:
                            self._bucket.fetch(name, opened)
                    verify_manifest(partial)
                    # Before the checkpoint appears: a crash in between must not leave it without them.
                    self._restore_files(sizes, replace=True)
            except (IntegrityError, ObjectAbsentError) as error:
                logger.warning("checkpoint %s of %s is skipped: %s", path.name, self._bucket.uri, error)
            else:
                logger.info("checkpoint %s came from %s", path.name, self._bucket.uri)
                return True
        return False

    def _restore_files(self, sizes: Mapping[str, int], *, replace: bool) -> bool:
        """Downloads files outside the checkpoints that are absent or, with `replace`, different; tells if any."""
        came = False
        for name in sorted(name for name in sizes if not name.startswith(f"{CHECKPOINTS}/")):
            path = self._folder / name
            if path.exists() and not replace:
                continue
            try:
                came |= self._restore_file(name, path)
            except (IntegrityError, ObjectAbsentError) as error:
                logger.warning("%s of %s is left out: %s", name, self._bucket.uri, error)
        return came

    def _restore_file(self, name: str, path: Path) -> bool:
        expected = self._bucket.sha256(name)
        if path.exists():
            with path.open("rb") as file:
                if sha256_of(file) == expected:
                    return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        with partial.open("wb") as file:
            found = self._bucket.fetch(name, file)
            os.fsync(file.fileno())
        if found != expected:
            partial.unlink()
            raise IntegrityError(path, f"sha256 {expected}", f"sha256 {found}")
        partial.replace(path)
        return True

    def _newest_intact(self) -> int:
        """Gives the update of the folder's newest checkpoint, -1 without any that is intact."""
        try:
            path = latest_checkpoint(self._root)
        except IntegrityError:
            return -1  # all are damaged, and the bucket may have better ones
        return -1 if path is None else max(_updates_of([path.name]))

    def _saved_updates(self) -> set[int]:
        return _updates_of(path.name for path in self._root.glob("update-*"))

    def _files(self) -> list[Path]:
        """Lists the files outside the checkpoints, without those that are being written."""
        return [
            path
            for path in sorted(self._folder.rglob("*"))
            if not path.is_relative_to(self._root)
            and not any(part.endswith(PARTIAL_SUFFIX) for part in path.relative_to(self._folder).parts)
            and path.is_file()
        ]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def run_names(uri: str) -> list[str]:
    """Lists the runs that are mirrored below `uri`; raises `MirrorError` when the bucket cannot be listed."""
    return Bucket(uri).folders()


def require_run(uri: str, name: str) -> None:
    """Raises `MirrorError`, with the runs that there are, unless a run of this name is mirrored below `uri`."""
    names = run_names(uri)
    if name not in names:
        there_are = f"there are {', '.join(names)}" if names else "there is none at all"
        raise MirrorError(f"no run {name} in {uri}; {there_are}")


class _Stamp(NamedTuple):
    """What tells a file from another one, and from itself once it is changed."""

    size: int
    modified_ns: int
    inode: int


def _stamp(file: BinaryIO) -> _Stamp:
    status = os.fstat(file.fileno())
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def _updates_in(names: Iterable[str]) -> set[int]:
    """Gives the updates of which there is any file of a checkpoint."""
    parts = (name.split("/") for name in names)
    return _updates_of(folders[1] for folders in parts if folders[0] == CHECKPOINTS and len(folders) > 2)


def _updates_of(folders: Iterable[str]) -> set[int]:
    updates = (folder.removeprefix("update-") for folder in folders)
    return {int(update) for update in updates if update.isdecimal()}


def _pauses() -> Iterator[float]:
    """Gives pauses in seconds that double, each shortened at random so that many runs do not come back at once."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)
