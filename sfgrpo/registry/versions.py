"""Find versions of registered models, and download them only as they were registered.

The manifest of a version lists every file with its SHA-256, and the manifest's own SHA-256 is a tag of the version.
Files are in the artifact store and tags in the database, so a change by somebody who can write only one of them is
noticed. A version that holds anything but safetensors, text and pictures is refused before anything is loaded from it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.loading import as_config_error
from sfgrpo.config.names import checked_alias, checked_model_name
from sfgrpo.errors import ConfigError, IntegrityError
from sfgrpo.registry.register import MANIFEST_TAG, RegistryError
from sfgrpo.runtime.manifest import MANIFEST, sha256_of_file, verify_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient


ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>[1-9][0-9]{0,9}))")
MAX_NUMBER = 2**31 - 1
"""The largest number of a version that MLflow's databases hold."""
PLAIN_SUFFIXES = frozenset({".json", ".md", ".png", ".py", ".safetensors", ".txt", ".yaml"})
PLAIN_NAMES = frozenset({"MLmodel"})
RESOLVED_BY_MLFLOW = "registered_model_meta"
"""File that MLflow adds to a version at download."""
BYTECODE = "__pycache__"
"""Folder that Python adds to a version that is loaded straight from a store of files."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version of a registered model."""

    model: str
    number: int
    tags: Mapping[str, str]

    @property
    def address(self) -> str:
        """Address that always means this version."""
        return f"models:/{self.model}/{self.number}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """The downloaded and verified files of a version."""

    folder: Path
    adapter: Path
    """Folder of the LoRA weights."""
    pretrained: str
    """Folder of the base pipeline; its hub name where the version holds no base pipeline."""
    settings: Mapping[str, Any]
    """Fields of `ServingDefaults`."""


def find_version(client: MlflowClient, address: str) -> Version:
    """Look up `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

    Raises:
        ConfigError: It is no such address.
        RegistryError: There is no such model, alias or version; the message lists the existing ones.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None or int(parts["number"] or 1) > MAX_NUMBER:
        raise ConfigError(f"{address!r} is no model; give models:/NAME@ALIAS or models:/NAME/NUMBER")
    name, alias, number = parts["name"], parts["alias"], parts["number"]
    with as_config_error(address):
        checked_model_name(name)
        # MLflow's word for the newest version is refused too: it means another version after every registration.
        checked_alias(alias or "none")
    found = number_of_alias(client, name, alias) if alias else int(number)
    version = None if found is None else read_version(client, name, found)
    if version is None:
        raise RegistryError(f"{address} does not exist; {_existing(client, name)}")
    return version


def require_model(client: MlflowClient, model: str) -> None:
    """Raise `RegistryError` unless the model is registered; the message lists the registered models."""
    names = sorted(found.name for found in client.search_registered_models())
    if model not in names:
        raise RegistryError(f"no model {model!r} is registered; registered models are {', '.join(names) or 'none'}")


def number_of_alias(client: MlflowClient, name: str, alias: str) -> int | None:
    """Return the version that an alias points to; None where there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        # MLflow has one code for a missing model and another for a missing alias.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def read_version(client: MlflowClient, name: str, number: int) -> Version | None:
    """Read a version; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return Version(model=name, number=number, tags=dict(found.tags))


def download_version(version: Version, folder: Path) -> Package:
    """Download a version into an empty or a new folder, and verify every file.

    Raises:
        RegistryError: A file is not the one that was registered; or the version has no manifest, cannot be read, or
            holds a file that might run code.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    expected = version.tags.get(MANIFEST_TAG)
    if expected is None:
        raise RegistryError(
            f"{version.address} was registered without a manifest, so its files cannot be verified; register its "
            "adapter again"
        )
    folder.mkdir(exist_ok=True)
    try:
        mlflow.artifacts.download_artifacts(artifact_uri=version.address, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise RegistryError(f"the files of {version.address} cannot be read ({error})") from error
    (folder / RESOLVED_BY_MLFLOW).unlink(missing_ok=True)
    for bytecode in list(folder.rglob(BYTECODE)):
        shutil.rmtree(bytecode)
    _refuse_programs(version, folder)
    _verify(version, folder, expected)
    flavor = Model.load(str(folder)).flavors["python_function"]
    files = {name: folder / entry["path"] for name, entry in flavor["artifacts"].items()}
    return Package(
        folder=folder,
        adapter=files["adapter"],
        pretrained=str(files.get("pipeline", flavor["config"]["pretrained"])),
        settings=flavor["config"],
    )


def _refuse_programs(version: Version, folder: Path) -> None:
    """Raise `RegistryError` if a file may be a pickle or anything else that runs when it is opened."""
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if path.suffix not in PLAIN_SUFFIXES and path.name not in PLAIN_NAMES:
            raise RegistryError(
                f"{version.address} holds {path.relative_to(folder)}; a version may hold safetensors, text, JSON and "
                "PNG files only, so nothing is loaded from it"
            )


def _verify(version: Version, folder: Path, expected: str) -> None:
    manifest = folder / MANIFEST
    try:
        found = f"sha256 {sha256_of_file(manifest)}" if manifest.exists() else "no file"
        if found != f"sha256 {expected}":
            raise IntegrityError(manifest, f"sha256 {expected}", found)
        verify_manifest(folder)
    except IntegrityError as error:
        raise RegistryError(
            f"{version.address} is not what was registered, so nothing is loaded from it: "
            f"{error.path.relative_to(folder)}: expected {error.expected}, found {error.found}"
        ) from error


def _existing(client: MlflowClient, name: str) -> str:
    """Return the versions and aliases of a model as text, or the registered models if it is none of them."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(model.name for model in client.search_registered_models())
        return f"registered models are {', '.join(names)}" if names else "no model is registered here"
    aliases = [f"@{alias} (version {number})" for alias, number in sorted(model.aliases.items())]
    numbers = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
    return f"{name} has the aliases {', '.join(aliases) or 'none'} and the versions {', '.join(map(str, numbers))}"
