"""Check all that the commands need, and print one line for each check."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

from sfgrpo.config.addresses import sqlite_path
from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.loading import as_config_error
from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.config.stages import STAGES, LaunchStage, PromoteStage, RegisterStage, StageType, TrainStage, load_config
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.paths import EVALUATION_PROMPTS, POLICY, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.preflight.checkout import check_checkout, check_packages
from sfgrpo.preflight.machine import check_folder, check_locks, check_memory, describe_device
from sfgrpo.preflight.models import check_base_model, check_reward_model
from sfgrpo.preflight.network import check_prefect, check_proxies, describe_hub
from sfgrpo.preflight.report import Check, Doubt, examine
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.redaction import without_secrets

MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def doctor(params: Path, environment: Environment) -> None:
    """Run all checks and print their findings.

    Raises:
        ConfigError: A check found a problem.
    """
    num_problems, checks = 0, _checks(params, environment)
    for finding in examine(checks):
        num_problems += finding.status == "problem"
        lines = without_secrets(finding.text).splitlines()
        print(
            f"{MARKS[finding.status]:9}{finding.name:15}{lines[0]}", *(f"{'':24}{line}" for line in lines[1:]), sep="\n"
        )
    if num_problems:
        raise ConfigError(f"{num_problems} of {len(checks)} checks found a problem; their lines say what to do")


def _checks(params: Path, environment: Environment) -> Mapping[str, Check]:
    """Return all checks by name, the quick ones first."""
    artifacts = (sqlite_path(environment.tracking_uri) or Path("mlflow.db")).parent
    return {
        "parameters": functools.partial(_check_parameters, params),
        "names": functools.partial(_describe_names, params),
        "git": functools.partial(check_checkout, Path.cwd()),
        "packages": check_packages,
        "proxy": functools.partial(check_proxies, _services(environment)),
        "working disk": functools.partial(check_folder, Path.cwd()),
        "state disk": functools.partial(check_folder, environment.scratch_dir),
        "locks": functools.partial(check_locks, environment.scratch_dir),
        "database locks": functools.partial(check_locks, artifacts),
        "base model": functools.partial(_check_base_model, params),
        "reward models": functools.partial(_check_reward_models, params),
        "hub": functools.partial(_describe_hub, params),
        "prompts": functools.partial(_check_prompts, params),
        "adapter": _check_adapter,
        "memory": functools.partial(_check_memory, params),
        "Prefect": check_prefect,
        "mirror": functools.partial(_check_bucket, environment.mirror, "SFGRPO_MIRROR"),
        "DVC remote": functools.partial(_check_bucket, environment.dvc_remote, "SFGRPO_DVC_REMOTE"),
        "MLflow": functools.partial(_check_mlflow, environment.tracking_uri),
        "device": functools.partial(describe_device, environment),
    }


def _check_parameters(params: Path) -> str:
    """Load the parameters of every stage, and divide the work among the processes."""
    for stage in STAGES:
        load_config(stage, params)
    launch = load_config(LaunchStage, params).launch
    BatchArithmetic(config=load_config(TrainStage, params), num_processes=launch.world_size)
    return f"{params}, {len(STAGES)} stages, {launch.world_size} process(es)"


def _load(stage: type[StageType], params: Path) -> StageType:
    """Load the parameters of a stage; the check `parameters` has said what is wrong with them."""
    try:
        return load_config(stage, params)
    except ConfigError as error:
        raise Doubt("not looked at, since parameters are wrong") from error


def _describe_names(params: Path) -> str:
    registry = _load(RegisterStage, params).registry
    return f"versions become {registry.model_name}@{registry.alias}"


def _policy(params: Path) -> PolicyConfig:
    return _load(TrainStage, params).policy


def _rewards(params: Path) -> dict[str, RewardConfig]:
    config = _load(PromoteStage, params)
    return {"reward": config.reward, "promotion.held_out": config.promotion.held_out}


def _check_base_model(params: Path) -> str:
    from sfgrpo.factory import check_pretrained

    check_pretrained(_policy(params))
    return check_base_model(_policy(params))


def _check_reward_models(params: Path) -> str:
    from sfgrpo.rewards import check_reward

    found = []
    for section, config in _rewards(params).items():
        with as_config_error(section):
            check_reward(config.name, pretrained=config.pretrained, revision=config.revision)
        found.append(check_reward_model(config, section))
    return ", ".join(found)


def _describe_hub(params: Path) -> str:
    names = [_policy(params).pretrained, *(config.pretrained for config in _rewards(params).values())]
    return describe_hub(is_used=any(name is not None and not Path(name).exists() for name in names))


def _check_memory(params: Path) -> str:
    return check_memory(Path(_policy(params).pretrained))


def _check_prompts(params: Path) -> str:
    """Check the prompt files, if they are there, by the tokenizers of a base model that is on this disk."""
    from sfgrpo.factory import make_text_encoders
    from sfgrpo.prompt_checks import check_prompts
    from sfgrpo.prompts import read_prompt_file

    paths = (TRAINING_PROMPTS, VALIDATION_PROMPTS, EVALUATION_PROMPTS)
    if absent := [str(path) for path in paths if not path.exists()]:
        return f"{' and '.join(absent)} not written yet; `python -m sfgrpo prompts` does"
    training, validation, evaluation = map(read_prompt_file, paths)
    policy = _policy(params)
    is_here = Path(policy.pretrained).is_dir()
    encoders = make_text_encoders(policy.pretrained, policy.revision, policy.max_sequence_length) if is_here else ()
    check_prompts(evaluation, (), validation=validation, training=training, encoders=encoders)
    return (
        f"{len(training.prompts)} for training, {len(validation.prompts)} for validation, "
        f"{len(evaluation.prompts)} for evaluation"
    )


def _check_adapter() -> str:
    """Read what the last training has published, if anything."""
    if not POLICY.exists():
        return f"{POLICY} not written yet; `python -m sfgrpo train` does"
    from sfgrpo.training.published import read_published

    published = read_published(POLICY)
    return f"{POLICY}, of update {published.record.update}, rank {published.adapter.rank}"


def _check_bucket(address: str | None, variable: str) -> str:
    """List a bucket, or look at a folder."""
    if address is None:
        return f"{variable} is not set"
    if not address.startswith("s3://"):
        return check_folder(Path(address))
    from sfgrpo.storage.s3 import Bucket

    return f"{address} has {len(Bucket(address).folders())} folders"


def _check_mlflow(uri: str) -> str:
    """Check the store, without making a file that is missing."""
    from sfgrpo.tracking.mlflow_client import load_mlflow

    database = sqlite_path(uri)
    if database is not None and not database.exists():
        return f"{uri}, which the first training makes"
    load_mlflow()
    from sfgrpo.tracking.store import prepare_store, server_version

    prepare_store(uri)
    if database is not None:
        return f"{uri}, of this version"
    if not uri.startswith(("http://", "https://")):
        return f"{uri}: the database is asked when it is used"
    version = server_version(uri)
    if version is None:
        raise SfgrpoError(
            f"MLFLOW_TRACKING_URI {uri} does not answer; start the server there, or unset the variable to record to a "
            "file"
        )
    return f"{uri} runs MLflow {version}"


def _services(environment: Environment) -> dict[str, str]:
    """Return the addresses of services by the variables that name them."""
    named = {
        "MLFLOW_TRACKING_URI": environment.tracking_uri,
        "PREFECT_API_URL": os.environ.get("PREFECT_API_URL", ""),
        "AWS_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL", ""),
    }
    return {name: address for name, address in named.items() if address.startswith("http")}
