"""Register the trained policy as a model version in MLflow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.config.stages import RegisterStage
from sfgrpo.errors import ConfigError, MismatchError
from sfgrpo.evaluation.identity import EVALUATED, EvaluationIdentity, drawing_protocol
from sfgrpo.factory import base_of, check_pretrained, policy_of
from sfgrpo.paths import EVALUATE_REPORT, POLICY, REGISTRATION
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import write_json
from sfgrpo.tracking.provenance import code_tags, flow_tags
from sfgrpo.training.run import EXPERIMENT
from sfgrpo.types import TAGS

if TYPE_CHECKING:
    from sfgrpo.policies.adapter import Base
    from sfgrpo.registry.register import ServingDefaults
    from sfgrpo.training.published import PublishedPolicy

SCORES = ("geneval/overall", *(f"geneval/{tag}" for tag in TAGS))
"""Metrics that a version carries as tags."""


def register(config: RegisterStage, environment: Environment) -> None:
    """Register the trained policy as a model version, if the report of its evaluation is of it as it will be served.

    The same adapter with the same evaluation, at the same commit, is registered once.

    Raises:
        ConfigError: Training or evaluation are absent.
        MismatchError: The report is of another adapter, base model, prompts or protocol.
        AdapterError: The adapter is damaged, or changes nothing.
    """
    from sfgrpo.registry.register import TrainedAdapter, register_version
    from sfgrpo.training.published import read_published

    published = read_published(POLICY)
    record = published.record
    metrics, identity = _read_report(EVALUATE_REPORT / "metrics.json")
    check_pretrained(config.policy)
    policy = policy_of(published.adapter, config.policy)
    base = base_of(policy)
    _require_report_of(identity, published, base, config)
    code = code_tags(Path.cwd()) | flow_tags(environment, Path.cwd())
    trained = {
        "prompts_sha256": record.training_prompts_sha256,
        "validation_prompts_sha256": record.validation_prompts_sha256,
        "run_key": record.run_key,
    }
    version = register_version(
        uri=environment.tracking_uri,
        scratch=environment.scratch_dir,
        experiment=EXPERIMENT,
        registry=config.registry,
        adapter=TrainedAdapter(
            folder=published.adapter.path.parent,
            # A task without evaluation prompts has no score.
            metrics={name: metrics[name] for name in SCORES if name in metrics},
            provenance=code | trained | identity.tags(),
            run_id=record.mlflow_run_id,
        ),
        serving=_serving(config, base),
    )
    write_json(REGISTRATION, dataclasses.asdict(version))
    print(f"model version {version.version} registered as {version.name}@{version.alias}")


def _read_report(path: Path) -> tuple[dict[str, float], EvaluationIdentity]:
    """Return the metrics of the trained policy, and what they are of."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return dict(report["policy"]), EvaluationIdentity.from_dict(report[EVALUATED])
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `python -m sfgrpo evaluate` writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say what it is of ({type(error).__name__}: {error}); `python -m sfgrpo evaluate` writes "
            "one that does"
        ) from error


def _require_report_of(
    found: EvaluationIdentity, published: PublishedPolicy, base: Base, config: RegisterStage
) -> None:
    """Raise `MismatchError` unless the report is of the published adapter, evaluated as the parameters say."""
    from sfgrpo.evaluation.evaluate import protocol_of
    from sfgrpo.policies.adapter import require_base

    require_base(published.adapter, base)
    expected = EvaluationIdentity(
        adapter_sha256=published.adapter.sha256,
        base_revision=base.revision,
        prompts_sha256=published.record.evaluation_prompts_sha256,
        protocol=drawing_protocol(protocol_of(config.evaluation), config.policy),
        rewards=found.rewards,
    )
    if differences := list(found.differences(expected)):
        raise MismatchError(
            f"{EVALUATE_REPORT / 'metrics.json'} is of another evaluation than that of {POLICY} by these parameters: "
            f"{', '.join(differences)}; evaluate again by `python -m sfgrpo evaluate`"
        )


def _serving(config: RegisterStage, base: Base) -> ServingDefaults:
    from sfgrpo.registry.register import ServingDefaults

    return ServingDefaults(
        pretrained=config.policy.pretrained,
        revision=None if base.is_folder else base.revision,
        dtype=config.policy.dtype,
        resolution=config.policy.resolution,
        max_sequence_length=config.policy.max_sequence_length,
        num_inference_steps=config.evaluation.num_steps,
        guidance_scale=config.evaluation.guidance_scale,
        **dataclasses.asdict(config.serving),
    )
