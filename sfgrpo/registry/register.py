"""Register a trained adapter with its base model as a version of an MLflow model, which must draw an image."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import RegistryError
from sfgrpo.registry.contents import SERVING, ForeignContentError, read_model_file
from sfgrpo.registry.drawing import PNG_SIGNATURE, SMOKE_PROMPT, smoke_test
from sfgrpo.registry.package import MANIFEST_TAG
from sfgrpo.registry.versions import find_version
from sfgrpo.runtime.files import temporary_directory
from sfgrpo.runtime.manifest import MANIFEST, sha256_of_file, write_manifest
from sfgrpo.tracking.mlflow_client import connect, find_or_create_experiment, find_run
from sfgrpo.tracking.provenance import BRANCH_TAG, COMMIT_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient


SERVING_FILE = Path(__file__).with_name(SERVING)
"""MLflow copies this file into every version and runs it there, without sfgrpo."""
REQUIREMENTS = ("accelerate", "diffusers", "mlflow", "pandas", "peft", "pillow", "torch", "transformers")
IMPORTED_TAG = "sfgrpo.imported_run_id"
"""Tag of a stand-in: the run of another store that trained the adapter."""
IDENTIFYING = ("git_commit", "evaluation_sha256")
"""Tags, beside the digest of the adapter, that make a version another one: its scores and settings are of these."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingDefaults:
    """How the registered model draws, unless its caller passes other parameters."""

    pretrained: str
    """Folder of the base pipeline, which becomes part of the version; or its hub name, which is only recorded."""
    revision: str | None
    dtype: str
    resolution: int
    max_sequence_length: int
    num_inference_steps: int
    guidance_scale: float
    max_prompts: int
    """Of one request, as are the next two."""
    max_steps: int
    max_guidance_scale: float
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """A trained adapter, with what is recorded about it."""

    folder: Path
    """Folder of the LoRA weights."""
    metrics: Mapping[str, float]
    """GenEval scores: tags of the version, and metrics of the run under `final/`."""
    provenance: Mapping[str, str]
    """Tags that identify code and data; `git_commit` is required."""
    run_id: str | None
    """Run that trained it. A store that does not have this run gets a stand-in."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A version of a registered model, and whether this call created it."""

    name: str
    version: int
    alias: str
    run_id: str
    """Run in the tracking store that trained it, or a stand-in."""
    created: bool


def register_version(
    uri: str,
    experiment: str,
    registry: RegistryConfig,
    adapter: TrainedAdapter,
    serving: ServingDefaults,
    scratch: Path,
) -> RegisteredVersion:
    """Find or create the version of this adapter at this commit, draw an image with it, and point the alias at it.

    A version that fails to draw never gets the alias. The same adapter file with the same evaluation at the same commit
    is always the same version, so a retry registers nothing twice.

    Raises:
        AdapterError: The adapter is damaged, or changes nothing.
        RegistryError: The base pipeline holds code or pickles, the version is not what was registered, or it draws no
            image.
    """
    from sfgrpo.policies.adapter import WEIGHTS_NAME, read_effective_adapter

    digest = read_effective_adapter(adapter.folder).sha256
    client = connect_globally(uri)
    name = registry.model_name
    version = _find_version(client, name, digest, adapter.provenance)
    created = version is None
    if version is None:
        experiment_id = find_or_create_experiment(client, uri, experiment)
        settings = dataclasses.asdict(serving) | {"adapter_file": WEIGHTS_NAME, "adapter_sha256": digest}
        version = _create_version(client, experiment_id, name, adapter, settings, scratch)
    number, parent_run_id = version
    for key in {BRANCH_TAG, COMMIT_TAG} & adapter.provenance.keys():
        client.set_tag(parent_run_id, key, adapter.provenance[key])
    smoke_test(find_version(client, f"models:/{name}/{number}"), scratch)
    client.set_model_version_tag(name, str(number), "smoke_test", "passed")
    client.set_registered_model_alias(name, registry.alias, str(number))
    return RegisteredVersion(name=name, version=number, alias=registry.alias, run_id=parent_run_id, created=created)


def connect_globally(uri: str) -> MlflowClient:
    """Connect to a store, and make it the one in which this process looks `models:/` addresses up."""
    client = connect(uri)
    import mlflow

    # MLflow resolves `models:/` addresses against the process-wide store, whichever client asks.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return client


def _find_version(
    client: MlflowClient, name: str, digest: str, provenance: Mapping[str, str]
) -> tuple[int, str] | None:
    tags = {"adapter_sha256": digest} | {key: provenance[key] for key in IDENTIFYING if key in provenance}
    conditions = [f"name = '{name}'", *(f"tags.{key} = '{value}'" for key, value in tags.items())]
    found = client.search_model_versions(" and ".join(conditions))
    return max(((int(version.version), str(version.run_id)) for version in found), default=None)


def _create_version(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    adapter: TrainedAdapter,
    settings: dict[str, Any],
    scratch: Path,
) -> tuple[int, str]:
    """Upload the package of an adapter and make a version of it; return its number and the run that it belongs to."""
    import mlflow

    digest = settings["adapter_sha256"]
    run_id = _parent_run(client, experiment_id, adapter.run_id, digest)
    with temporary_directory(scratch, "package") as folder:
        package = _save_package(folder / "model", adapter.folder, settings)
        model_id = _log_model(client, experiment_id, run_id, name, package)
        manifest_digest = sha256_of_file(package / MANIFEST)
    final = {f"final/{key}": value for key, value in adapter.metrics.items()}
    mlflow.log_metrics(final, run_id=run_id, model_id=model_id)
    tags = {
        **adapter.provenance,
        **{key: f"{value:.4f}" for key, value in adapter.metrics.items()},
        "adapter_sha256": digest,
        MANIFEST_TAG: manifest_digest,
        "parent_run_id": adapter.run_id or run_id,
    }
    registered = mlflow.register_model(f"models:/{model_id}", name, await_registration_for=None, tags=tags)
    return int(registered.version), run_id


def _parent_run(client: MlflowClient, experiment_id: str, run_id: str | None, digest: str) -> str:
    if run_id is not None and find_run(client, run_id) is not None:
        return run_id
    origin = run_id or f"adapter {digest[:16]}"
    known = client.search_runs([experiment_id], f"tags.`{IMPORTED_TAG}` = '{origin}'", max_results=1)
    if known:
        return str(known[0].info.run_id)
    run = client.create_run(experiment_id, run_name=f"import-{digest[:8]}", tags={IMPORTED_TAG: origin})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _save_package(package: Path, adapter: Path, settings: dict[str, Any]) -> Path:
    """Save serving code, base pipeline and adapter with a manifest; only safetensors and text, nothing pickled."""
    import mlflow
    import pandas as pd

    artifacts = {"adapter": str(adapter)}
    if Path(settings["pretrained"]).is_dir():
        artifacts["pipeline"] = settings["pretrained"]
    params = {name: settings[name] for name in ("num_inference_steps", "guidance_scale", "seed")}
    # Without a name for the column, a list of prompts is accepted as well as a data frame.
    signature = mlflow.models.infer_signature([SMOKE_PROMPT], pd.DataFrame({"png": [PNG_SIGNATURE]}), params)
    # No package index has "2.13.0+cpu".
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in REQUIREMENTS}
    mlflow.pyfunc.save_model(
        package,
        python_model=str(SERVING_FILE),
        artifacts=artifacts,
        model_config=settings,
        signature=signature,
        input_example=[SMOKE_PROMPT],
        # Listed here, because MLflow would find them by loading the model in another process.
        pip_requirements=[f"{name}=={version}" for name, version in versions.items()],
    )
    try:
        read_model_file(package)
    except ForeignContentError as error:
        raise RegistryError(
            f"policy.pretrained: {settings['pretrained']} cannot be registered: {error}; remove it from the folder"
        ) from error
    write_manifest(package)
    return package


def _log_model(client: MlflowClient, experiment_id: str, run_id: str, name: str, package: Path) -> str:
    """Upload a package as a logged model of a run, and return its id."""
    model = client.create_logged_model(experiment_id, name, source_run_id=run_id, model_type="text-to-image")
    client.log_model_artifacts(model.model_id, str(package))
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)
