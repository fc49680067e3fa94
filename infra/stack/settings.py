"""Settings of the stack from STACK_ variables; a running stack keeps its own in its folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import pydantic
from pydantic import Field
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from sfgrpo.config.loading import unknown_key
from sfgrpo.errors import ConfigError

PREFIX = "STACK_"
LOOPBACK = "127.0.0.1"

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Settings of one stack; an empty variable counts as absent."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    folder: Path = Field(default=Path(".stack"), validation_alias="STACK_DIR")
    """Folder of all data, logs and secrets."""
    host: IPv4Address = Field(default=IPv4Address(LOOPBACK), validation_alias="STACK_HOST")
    """Address at which MLflow and Prefect listen; all other programs listen on loopback only."""
    postgres_port: Port = Field(default=5433, validation_alias="STACK_POSTGRES_PORT")
    """Not 5432, which the server has that Debian's package starts."""
    s3_port: Port = Field(default=9000, validation_alias="STACK_S3_PORT")
    mlflow_port: Port = Field(default=5000, validation_alias="STACK_MLFLOW_PORT")
    prefect_port: Port = Field(default=4200, validation_alias="STACK_PREFECT_PORT")
    webhook_port: Port = Field(default=4201, validation_alias="STACK_WEBHOOK_PORT")
    auth: bool = Field(default=True, validation_alias="STACK_AUTH")
    """Whether MLflow and Prefect ask for credentials."""
    allow_root: bool = Field(default=False, validation_alias="STACK_ALLOW_ROOT")
    """Whether root may run the stack, and thereby every flow run."""
    origins: str = Field(default="", validation_alias="STACK_ORIGINS")
    """Further addresses of MLflow's and Prefect's pages, separated by commas, such as those of a proxy with TLS."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Settings:
        if not self.auth and self.is_exposed:
            raise ValueError(
                f"STACK_AUTH is off, but STACK_HOST {self.host} lets other machines in; switch it on or unset one of "
                "the two"
            )
        if not self.auth and self.allow_root:
            raise ValueError(
                "STACK_AUTH is off, but STACK_ALLOW_ROOT lets flows run as root, so that every user of this machine "
                "would be root; unset one of the two"
            )
        for origin in self.further_origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}" or "*" in origin:
                raise ValueError(
                    f"STACK_ORIGINS: {origin!r} is no address such as https://prefect.example; separate several by "
                    "commas"
                )
        ports: dict[int, str] = {}
        for variable, port in self.ports.items():
            if port in ports:
                raise ValueError(f"{ports[port]} and {variable} are both {port}; change one of them")
            ports[port] = variable
        return self

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach MLflow and Prefect."""
        return not self.host.is_loopback

    @property
    def further_origins(self) -> list[str]:
        """The addresses of STACK_ORIGINS."""
        return [origin.strip() for origin in self.origins.split(",") if origin.strip()]

    @property
    def local_host(self) -> str:
        """Address by which this machine itself reaches MLflow and Prefect."""
        return LOOPBACK if self.host.is_unspecified else str(self.host)

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names of their variables."""
        return {
            str(field.validation_alias): getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name.endswith("_port")
        }

    @property
    def chosen(self) -> dict[str, object]:
        """The settings that were given and are not defaults, by the names of their variables."""
        values = json.loads(self.model_dump_json())
        return {str(type(self).model_fields[name].validation_alias): values[name] for name in self.model_fields_set}


def read_settings() -> Settings:
    """Read the settings; raise `ConfigError` for a bad value or an unknown `STACK_` variable."""
    variables = [str(field.validation_alias) for field in Settings.model_fields.values()]
    if unknown := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in variables):
        raise ConfigError("\n".join(f"environment: {name}: {unknown_key(name, variables)}" for name in unknown))
    try:
        return Settings()
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_message(problem) for problem in error.errors())) from error


def dump_settings(settings: Settings) -> str:
    """Return all settings but the folder as JSON, by the names of their variables."""
    values = json.loads(settings.model_dump_json())
    fields = type(settings).model_fields
    named = {str(field.validation_alias): values[name] for name, field in fields.items() if name != "folder"}
    return json.dumps(named, indent=2) + "\n"


def parse_settings(folder: Path, text: str) -> Settings:
    """Parse the output of `dump_settings`; None, which earlier versions wrote for "not given", is the default."""
    known = {name: value for name, value in json.loads(text).items() if value is not None}
    return Settings.model_validate({"STACK_DIR": folder, **known})


def open_doors(settings: Settings) -> list[str]:
    """Return a warning for each protection that was switched off."""
    warnings = []
    if not settings.auth:
        warnings.append(
            "STACK_AUTH is off: every user and every program of this machine can run commands as you, by Prefect, and "
            "change every model; `make stack-down`, unset it and start again"
        )
    if settings.allow_root and os.geteuid() == 0:
        warnings.append("STACK_ALLOW_ROOT: flows run as root, and who can log in to Prefect can do everything here")
    return warnings


def require_ordinary_user(settings: Settings) -> None:
    """Raise `ConfigError` if root starts the stack and nobody has allowed it."""
    if os.geteuid() == 0 and not settings.allow_root:
        raise ConfigError(
            "root would run the stack, and a flow run could do everything on this machine; start it as another user "
            "who owns the checkout, or set STACK_ALLOW_ROOT=true where there is only root, as in a container"
        )


def require_free_ports(settings: Settings, variables: Iterable[str]) -> None:
    """Raise `ConfigError` for the first port, given by its variable, on which something else listens."""
    for variable in variables:
        port = settings.ports[variable]
        try:
            for host in {LOOPBACK, str(settings.host)}:
                socket.create_server((host, port)).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"port {port} cannot be used ({reason}); choose another by {variable}") from error


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == "value_error":
        return f"environment: {problem['ctx']['error']}"
    return f"environment: {problem['loc'][0]}: {problem['input']!r}: {problem['msg']}; correct or unset the variable"
