"""Find versions of registered models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfgrpo.config.loading import as_config_error
from sfgrpo.config.names import checked_alias, checked_model_name
from sfgrpo.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient


ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>[1-9][0-9]{0,9}))")
MAX_NUMBER = 2**31 - 1
"""The largest number of a version that MLflow's databases hold."""


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
