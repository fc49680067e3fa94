"""Download a mirrored run from its S3 bucket to a machine that has less of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from sfgrpo.checkpoint.state import CHECKPOINTS, checkpoint_path, latest_checkpoint, update_of
from sfgrpo.errors import IntegrityError, MirrorError
from sfgrpo.runtime.files import PARTIAL_SUFFIX, atomic_directory
from sfgrpo.runtime.manifest import MANIFEST, sha256_of_file, verify_manifest
from sfgrpo.storage.s3 import Bucket, ObjectAbsentError

logger = logging.getLogger(__name__)


def require_run(uri: str, name: str) -> None:
    """Raise `MirrorError`, listing the runs there are, unless a run of this name is mirrored below `uri`."""
    names = Bucket(uri).folders()
    if name not in names:
        raise MirrorError(f"no run {name} in {uri}; the runs there are {', '.join(names) or 'none'}")


def restore_run(uri: str, folder: Path) -> bool:
    """Download a newer checkpoint and missing files of a run; return whether anything was downloaded.

    Only the newest complete checkpoint is downloaded, and only if it is newer than the newest intact one in `folder`.
    All other files are then replaced by those in the bucket, because they belong to that checkpoint. A damaged
    checkpoint is skipped with a warning.

    Raises:
        MirrorError: the bucket does not exist, refuses access or cannot be reached.
    """
    bucket = Bucket(f"{uri.rstrip('/')}/{folder.name}")
    sizes = bucket.sizes()
    restored = _restore_checkpoint(bucket, folder, sizes)
    return _restore_files(bucket, folder, sizes, replace=False) or restored


def _restore_checkpoint(bucket: Bucket, folder: Path, sizes: Mapping[str, int]) -> bool:
    # The manifest is uploaded last: a checkpoint without one is incomplete.
    manifests = (re.fullmatch(rf"{CHECKPOINTS}/update-(\d+)/{re.escape(MANIFEST)}", name) for name in sizes)
    newest_here = _newest_intact(folder / CHECKPOINTS)
    for update in sorted((int(match[1]) for match in manifests if match), reverse=True):
        if update <= newest_here:
            break
        path = checkpoint_path(folder / CHECKPOINTS, update)
        prefix = f"{path.relative_to(folder).as_posix()}/"
        try:
            with atomic_directory(path) as partial:
                for name in sorted(name for name in sizes if name.startswith(prefix)):
                    file = partial / name.removeprefix(prefix)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("wb") as opened:
                        bucket.fetch(name, opened)
                verify_manifest(partial)
                # Before the checkpoint appears: a crash in between must not leave it without its files.
                _restore_files(bucket, folder, sizes, replace=True)
        except (IntegrityError, ObjectAbsentError) as error:
            logger.warning("skipped checkpoint %s of %s: %s", path.name, bucket.uri, error)
        else:
            logger.info("restored checkpoint %s from %s", path.name, bucket.uri)
            return True
    return False


def _newest_intact(root: Path) -> int:
    """Return the update of the newest intact checkpoint below `root`, or -1 if there is none."""
    try:
        path = latest_checkpoint(root)
    except IntegrityError:
        return -1  # all are damaged, and the bucket may have better ones
    return -1 if path is None else update_of(path)


def _restore_files(bucket: Bucket, folder: Path, sizes: Mapping[str, int], *, replace: bool) -> bool:
    """Download files outside the checkpoints that are missing or, with `replace`, differ; return whether any."""
    restored = False
    for name in sorted(name for name in sizes if not name.startswith(f"{CHECKPOINTS}/")):
        path = folder / name
        if path.exists() and not replace:
            continue
        try:
            restored |= _restore_file(bucket, name, path)
        except (IntegrityError, ObjectAbsentError) as error:
            logger.warning("skipped %s of %s: %s", name, bucket.uri, error)
    return restored


def _restore_file(bucket: Bucket, name: str, path: Path) -> bool:
    expected = bucket.sha256(name)
    if path.exists() and sha256_of_file(path) == expected:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    with partial.open("wb") as file:
        found = bucket.fetch(name, file)
        os.fsync(file.fileno())
    if found != expected:
        partial.unlink()
        raise IntegrityError(path, f"sha256 {expected}", f"sha256 {found}")
    partial.replace(path)
    return True
