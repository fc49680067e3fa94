"""Registers a trained adapter, with its base model, as a version of an MLflow model that is proven to draw."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.errors import SfgrpoError
from sfgrpo.runtime.manifest import sha256_of_file, write_manifest
from sfgrpo.tracking.mlflow_client import connect, find_or_create_experiment, find_run
from sfgrpo.tracking.provenance import BRANCH_TAG, COMMIT_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
SERVING_FILE = Path(__file__).with_name("serving.py")
REQUIREMENTS = ("accelerate", "diffusers", "mlflow", "pandas", "peft", "pillow", "torch", "transformers")
SMOKE_PROMPT = "a photo of a circle"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMPORTED_TAG = "sfgrpo.imported_run_id"
MANIFEST_TAG = "manifest_sha256"
"""Tag of a version: digest of its manifest, which holds those of all its files."""


class RegistryError(SfgrpoError):
    """A registered version cannot be loaded, or draws no image."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingDefaults:
    """How the registered model draws, unless its caller says otherwise."""

    pretrained: str
    """Folder of the base pipeline, which becomes part of the version; or its hub name, which is recorded only."""
    revision: str | None
    dtype: str
    resolution: int
    max_sequence_length: int
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A version of a registered model, and whether this call made it."""

    name: str
    version: int
    alias: str
    run_id: str
    """Run in the tracking store that trained it, or that stands for the one that did."""
    created: bool

    def write(self, path: Path) -> None:
        """Saves the record as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def register_version(
    *,
    uri: str,
    experiment: str,
    model_name: str,
    alias: str,
    adapter: Path,
    serving: ServingDefaults,
    metrics: Mapping[str, float],
    provenance: Mapping[str, str],
    run_id: str | None,
) -> RegisteredVersion:
    """Finds or makes the version of this adapter at this commit, has it draw an image, and points the alias at it.

    A version that fails to draw never gets the alias. The same adapter file at the same commit is always the same
    version, so a retry registers nothing twice.

    Args:
        adapter: folder that holds the LoRA weights.
        metrics: GenEval scores, the overall one and those of the six tasks; they become tags of the version, and
            metrics of the run under `final/`.
        provenance: tags that name code and data; `git_commit` is required.
        run_id: run that trained the adapter. A store that does not know it gets a stand-in.

    Raises:
        RegistryError: the version cannot be loaded, or draws no image.
    """
    client = connect_globally(uri)
    digest = sha256_of_file(adapter / WEIGHTS_NAME)
    version = _find_version(client, model_name, digest, provenance["git_commit"])
    created = version is None
    if version is None:
        experiment_id = find_or_create_experiment(client, uri, experiment)
        parent = _parent_run(client, experiment_id, run_id, digest)
        settings = dataclasses.asdict(serving) | {"adapter_file": WEIGHTS_NAME, "adapter_sha256": digest}
        model_id, manifest_digest = _log_model(client, experiment_id, parent, model_name, adapter, settings, metrics)
        tags = {
            **provenance,
            **{key: f"{value:.4f}" for key, value in metrics.items()},
            "adapter_sha256": digest,
            MANIFEST_TAG: manifest_digest,
            "parent_run_id": run_id or parent,
        }
        version = _create_version(client, model_name, parent, model_id, tags)
    number, parent_run_id = version
    for name in (BRANCH_TAG, COMMIT_TAG):
        if name in provenance:
            client.set_tag(parent_run_id, name, provenance[name])
    smoke_test(uri, f"models:/{model_name}/{number}")
    client.set_model_version_tag(model_name, str(number), "smoke_test", "passed")
    client.set_registered_model_alias(model_name, alias, str(number))
    return RegisteredVersion(name=model_name, version=number, alias=alias, run_id=parent_run_id, created=created)


def draw(uri: str, model_uri: str, prompts: list[str], **params: Any) -> list[bytes]:
    """Loads a model, by version or by alias, as any user of the registry would, and draws a PNG file per prompt."""
    connect_globally(uri)
    import mlflow

    model = mlflow.pyfunc.load_model(model_uri)
    return list(model.predict(prompts, params=params)["png"])


def smoke_test(uri: str, model_uri: str) -> None:
    """Checks that a registered model draws: MLflow calls a version READY even when its files are missing."""
    try:
        (image,) = draw(uri, model_uri, [SMOKE_PROMPT], num_inference_steps=2)
    except Exception as error:
        raise RegistryError(
            f"{model_uri} is registered but cannot draw ({error}); delete the version, then register again"
        ) from error
    if not image.startswith(PNG_SIGNATURE):
        raise RegistryError(f"{model_uri} returned {image[:8]!r} instead of a PNG file")


def connect_globally(uri: str) -> MlflowClient:
    """Opens a store, and makes it the one in which this process looks `models:/` addresses up."""
    client = connect(uri)
    import mlflow

    # MLflow resolves `models:/` addresses against the process-wide store, whichever client asks.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return client


def _find_version(client: MlflowClient, name: str, digest: str, commit: str) -> tuple[int, str] | None:
    found = client.search_model_versions(
        f"name = '{name}' and tags.adapter_sha256 = '{digest}' and tags.git_commit = '{commit}'"
    )
    return max(((int(version.version), str(version.run_id)) for version in found), default=None)


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


def _log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    name: str,
    adapter: Path,
    settings: dict[str, Any],
    metrics: Mapping[str, float],
) -> tuple[str, str]:
    """Uploads serving code, base pipeline and adapter; only safetensors and text, nothing pickled.

    Returns the id of the logged model and the digest of its manifest.
    """
    import mlflow
    from mlflow.entities import Metric

    artifacts = {"adapter": str(adapter)}
    if Path(settings["pretrained"]).is_dir():
        artifacts["pipeline"] = settings["pretrained"]
    model = client.create_logged_model(experiment_id, name, source_run_id=run_id, model_type="text-to-image")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "model")
        mlflow.pyfunc.save_model(
            package,
            python_model=str(SERVING_FILE),
            artifacts=artifacts,
            model_config=settings,
            signature=_signature(settings),
            input_example=[SMOKE_PROMPT],
            # Given, because MLflow would find them out by loading the model in another process.
            pip_requirements=[f"{package}=={_public_version(package)}" for package in REQUIREMENTS],
        )
        manifest_digest = sha256_of_file(write_manifest(package))
        client.log_model_artifacts(model.model_id, str(package))
    client.finalize_logged_model(model.model_id, "READY")
    now_ms = time.time_ns() // 1_000_000
    client.log_batch(
        run_id, [Metric(f"final/{key}", value, now_ms, 0, model_id=model.model_id) for key, value in metrics.items()]
    )
    return model.model_id, manifest_digest


def _create_version(
    client: MlflowClient, name: str, run_id: str, model_id: str, tags: dict[str, str]
) -> tuple[int, str]:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id)
    return int(version.version), run_id


def _signature(settings: dict[str, Any]) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        # Without a name, a list of prompts will do as well as a data frame.
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.binary, "png")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.long, settings["num_inference_steps"]),
                ParamSpec("guidance_scale", DataType.double, settings["guidance_scale"]),
                ParamSpec("seed", DataType.long, settings["seed"]),
            ]
        ),
    )


def _public_version(package: str) -> str:
    # "2.13.0+cpu" is found on no index.
    return importlib.metadata.version(package).partition("+")[0]
