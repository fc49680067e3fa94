"""Register the trained policy as a model version in MLflow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sfgrpo.config.stages import RegisterStage
from sfgrpo.errors import SfgrpoError
from sfgrpo.paths import EVALUATE_REPORT, POLICY, REGISTRATION, TRAINING_PROMPTS
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import write_json
from sfgrpo.tracking.provenance import flow_tags, provenance_tags
from sfgrpo.training.run import EXPERIMENT
from sfgrpo.types import TAGS

SCORES = ("geneval/overall", *(f"geneval/{tag}" for tag in TAGS))
"""Metrics that a version carries as tags."""


def register(config: RegisterStage, environment: Environment) -> None:
    """Register the trained policy as a model version; the same adapter at the same commit is registered once."""
    from sfgrpo.registry.register import ServingDefaults, TrainedAdapter, register_version

    report = EVALUATE_REPORT / "metrics.json"
    for path in (POLICY / "training.json", report):
        if not path.exists():
            raise SfgrpoError(f"{path} does not exist; run `dvc repro` first")
    metrics = json.loads(report.read_text(encoding="utf-8"))["policy"]
    record = json.loads((POLICY / "training.json").read_text(encoding="utf-8"))
    version = register_version(
        uri=environment.tracking_uri,
        scratch=environment.scratch_dir,
        experiment=EXPERIMENT,
        registry=config.registry,
        adapter=TrainedAdapter(
            folder=POLICY / "adapter",
            # A task without evaluation prompts has no score.
            metrics={name: metrics[name] for name in SCORES if name in metrics},
            provenance=provenance_tags(Path.cwd(), TRAINING_PROMPTS) | flow_tags(environment, Path.cwd()),
            run_id=record["mlflow_run_id"],
        ),
        serving=ServingDefaults(
            pretrained=config.policy.pretrained,
            revision=config.policy.revision,
            dtype=config.policy.dtype,
            resolution=config.policy.resolution,
            max_sequence_length=config.policy.max_sequence_length,
            num_inference_steps=config.evaluation.num_steps,
            guidance_scale=config.evaluation.guidance_scale,
            **dataclasses.asdict(config.serving),
        ),
    )
    write_json(REGISTRATION, dataclasses.asdict(version))
    print(f"model version {version.version} registered as {version.name}@{version.alias}")
