"""Settings of the machine, from environment variables; none of them changes a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sfgrpo.config.addresses import checked_tracking_uri
from sfgrpo.config.loading import unknown_key
from sfgrpo.config.ranges import ProcessCount, RunId
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.redaction import without_secrets

PREFIX = "SFGRPO_"


class Environment(BaseSettings):
    """Settings of this machine: `device` is SFGRPO_DEVICE, and so on. An empty variable counts as absent."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, extra="ignore", alias_generator=lambda field: f"{PREFIX}{field.upper()}"
    )

    tracking_uri: Annotated[str, AfterValidator(checked_tracking_uri)] = Field(
        default="sqlite:///mlflow.db", validation_alias="MLFLOW_TRACKING_URI"
    )
    """MLflow server or database; the default is a file in the working directory."""
    run_id: RunId | None = Field(default=None, validation_alias="MLFLOW_RUN_ID")
    """MLflow run to write to, set by the parent process; None starts or finds one."""
    scratch_dir: Path = Field(default=Path(".scratch"), validation_alias="SFGRPO_SCRATCH")
    """Folder of the resumable state of runs."""
    device: str = Field(default="auto", pattern="^(auto|(cpu|cuda|mps)(:[0-9]{1,3})?)$")
    """torch device of the policy; `auto` takes a GPU if there is one."""
    evaluation_device: str | None = Field(default=None, pattern="^(cpu|cuda|mps)(:[0-9]{1,3})?$")
    """torch device on which a flow evaluates a running training; None lets the training do it itself."""
    num_threads: ProcessCount | None = None
    """CPU threads of torch; None leaves the choice to it."""
    timeout_s: float = Field(default=600, gt=0, le=10**6)
    """Seconds that a process of a training waits for the others."""
    grace_s: float = Field(default=20, gt=0, le=10**6)
    """Seconds that a training has to save its state when it is told to stop; Prefect gives 30 in all."""
    mirror: str | None = Field(default=None, pattern="^s3://[^/@?#]+(/.*)?$")
    """Bucket and prefix, s3://BUCKET/PREFIX, that keep a copy of the resumable state of trainings."""
    s3_encryption: str | None = Field(default=None, pattern="^(AES256|aws:kms(:[^:].*)?)$")
    """How S3 encrypts mirror and DVC remote: AES256, aws:kms or aws:kms:KEY; None uses the bucket's default."""
    dvc_remote: str | None = Field(default=None, pattern="^(s3://[^/@?#]+(/.*)?$|/)")
    """Bucket and prefix, s3://BUCKET/PREFIX, or folder to which scheduled runs push the outputs of DVC."""
    flow_run_id: str | None = None
    """Prefect id of the flow run that started this process."""
    flow_run_url: str | None = None
    """Prefect page of that flow run."""
    branch: str | None = None
    """Git branch with the parameters and the `dvc.lock` of that flow run."""


def read_environment() -> Environment:
    """Read the settings; raise `ConfigError` for a wrong value or an unknown `SFGRPO_` variable."""
    variables = [str(field.validation_alias) for field in Environment.model_fields.values()]
    ours = [name for name in variables if name.startswith(PREFIX)]
    if unknown := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in ours):
        raise ConfigError("\n".join(f"environment: {name}: {unknown_key(name, ours)}" for name in unknown))
    try:
        return Environment()
    except pydantic.ValidationError as error:
        lines = (
            f"environment: {problem['loc'][0]}: {without_secrets(repr(problem['input']))}: "
            f"{problem['msg'].removeprefix('Value error, ')}; correct or unset the variable"
            for problem in error.errors()
        )
        raise ConfigError("\n".join(lines)) from error
