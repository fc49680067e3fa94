"""Copy a version from the registry and verify it; nothing is ever loaded from anywhere but such a copy.

The manifest of a version lists every file with its SHA-256, and the manifest's own SHA-256 is a tag of the version.
Files are in the artifact store and tags in the database, so a change by somebody who can write only one of them is
noticed. Whoever can write both can choose weights and texts, but no code: see `contents`. Whatever happens to the store
afterwards, the copy stays what was verified: its folder belongs to this user alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfgrpo.errors import IntegrityError, RegistryError
from sfgrpo.registry.contents import ADAPTER_FILE, ForeignContentError, read_model_file
from sfgrpo.registry.versions import Version
from sfgrpo.runtime.files import temporary_directory
from sfgrpo.runtime.manifest import MANIFEST, sha256_of_file, verify_manifest

MANIFEST_TAG = "manifest_sha256"
"""Tag of a version: SHA-256 of its manifest, which holds those of all its files."""
ADAPTER_TAG = "adapter_sha256"
"""Tag of a version, and setting in its MLmodel: SHA-256 of its adapter's file."""
RESOLVED_BY_MLFLOW = "registered_model_meta"
"""File that MLflow adds to a version at download."""
BYTECODE = "__pycache__"
"""Folder that Python adds to a version that is loaded straight from a store of files."""
CURE = "restore its files from a backup, or delete the version"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """The downloaded and verified files of a version."""

    version: Version
    folder: Path
    adapter: Path
    """Folder of the LoRA weights."""
    pretrained: str
    """Folder of the base pipeline; its hub name where the version holds no base pipeline."""
    settings: Mapping[str, Any]
    """Fields of `ServingDefaults`."""


@contextlib.contextmanager
def verified_copy(version: Version, scratch: Path) -> Iterator[Package]:
    """Download a version into the scratch folder, verify it, and remove it with the block.

    Raises:
        RegistryError: As by `download_version`.
    """
    with temporary_directory(scratch, "version") as folder:
        yield download_version(version, folder)


def download_version(version: Version, folder: Path) -> Package:
    """Download a version into an empty or a new folder, and verify every file.

    Raises:
        RegistryError: A file is not the one that was registered; or the version has no manifest, cannot be read, or
            holds a file that might run code.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    expected = version.tags.get(MANIFEST_TAG)
    if expected is None:
        raise RegistryError(
            f"{version.address} was registered without a manifest, so its files cannot be verified; register its "
            "adapter again"
        )
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    try:
        mlflow.artifacts.download_artifacts(artifact_uri=version.address, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise RegistryError(f"the files of {version.address} cannot be read ({error}); {CURE}") from error
    (folder / RESOLVED_BY_MLFLOW).unlink(missing_ok=True)
    for bytecode in list(folder.rglob(BYTECODE)):
        shutil.rmtree(bytecode)
    return verified_package(version, folder, expected)


def verified_package(version: Version, folder: Path, expected: str) -> Package:
    """Verify every file of a version in `folder`; raise `RegistryError` as `download_version` does.

    Args:
        expected: SHA-256 of the manifest.
    """
    manifest = folder / MANIFEST
    try:
        found = f"sha256 {sha256_of_file(manifest)}" if manifest.exists() else "no file"
        if found != f"sha256 {expected}":
            raise IntegrityError(manifest, f"sha256 {expected}", found)
        verify_manifest(folder)
        flavor = read_model_file(folder)
    except IntegrityError as error:
        raise RegistryError(
            f"{version.address} is not what was registered, so nothing is loaded from it: "
            f"{error.path.relative_to(folder)}: expected {error.expected}, found {error.found}; {CURE}"
        ) from error
    except ForeignContentError as error:
        raise RegistryError(f"nothing is loaded from {version.address}: {error}; {CURE}") from error
    files = {name: folder / entry["path"] for name, entry in flavor["artifacts"].items()}
    return Package(
        version=version,
        folder=folder,
        adapter=files["adapter"],
        pretrained=str(files.get("pipeline", flavor["config"]["pretrained"])),
        settings=flavor["config"],
    )


def require_its_adapter(package: Package) -> None:
    """Raise `RegistryError` unless a version holds the adapter by whose digest it is found and judged."""
    version, file = package.version, package.adapter / ADAPTER_FILE
    found = sha256_of_file(file) if file.is_file() else "none"
    for place, named in (
        (f"its tag {ADAPTER_TAG}", version.tags.get(ADAPTER_TAG, found)),
        ("its MLmodel", package.settings.get(ADAPTER_TAG)),
    ):
        if named != found:
            raise RegistryError(
                f"{version.address} holds another adapter than {place} says: expected sha256 {named}, found {found}; "
                f"{CURE}"
            )
