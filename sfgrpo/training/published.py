"""What a training publishes: its adapter, and the record of what it was trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfgrpo.errors import AdapterError, ConfigError, MismatchError
from sfgrpo.policies.adapter import TRAIN_AGAIN, Adapter, Base, read_adapter, require_base

ADAPTER, RECORD = "adapter", "training.json"
"""Names below the folder of a published policy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """A training and the adapter that it published."""

    update: int
    """Updates that the adapter has seen: the best of all that were evaluated."""
    num_updates: int
    images: int
    run_key: str
    mlflow_run_id: str | None
    tracking_uri: str
    adapter_sha256: str
    base: Base
    training_prompts_sha256: str
    evaluation_prompts_sha256: str
    """Prompts by which the adapter was selected."""
    nothing_changed: str | None
    """Why, where the training has left the policy as it was."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPolicy:
    """A record, with the adapter that it is of."""

    record: TrainingRecord
    adapter: Adapter


def read_published(folder: Path) -> PublishedPolicy:
    """Read what a training has published in a folder.

    Raises:
        ConfigError: A file is absent or unusable.
        MismatchError: Record and adapter are of two trainings.
        AdapterError: The adapter changes nothing.
    """
    record = _read_record(folder / RECORD)
    adapter = read_adapter(folder / ADAPTER)
    if adapter.sha256 != record.adapter_sha256:
        raise MismatchError(
            f"{adapter.path} has the SHA-256 {adapter.sha256}, and {folder / RECORD} is of the adapter "
            f"{record.adapter_sha256}; {TRAIN_AGAIN}"
        )
    require_base(adapter, record.base)
    if adapter.changes_nothing or record.nothing_changed is not None:
        reason = record.nothing_changed or f"the adapter of update {record.update} leaves every layer as it is"
        raise AdapterError(f"{adapter.path} changes nothing, so there is nothing to evaluate or register: {reason}")
    return PublishedPolicy(record=record, adapter=adapter)


def reason_of_no_change(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any], adapter: Adapter) -> str | None:
    """Return in words why a training has changed nothing; None if it has changed the policy.

    Args:
        history: Metrics of all updates.
        best: Update and metrics of the evaluation whose adapter is published.
        adapter: The published adapter.
    """
    if history and all(metrics.get("groups/constant_fraction") == 1.0 for metrics in history):
        return (
            f"in none of the {len(history)} updates did the images of a prompt get different rewards; use a reward "
            "that tells them apart, or raise rollout.group_size or sampling.noise_level"
        )
    if best["update"] == 0:
        score = best["metrics"]["geneval/overall"]
        return (
            f"every evaluation was worse than that before the first update, GenEval {score:.3f}; train longer by "
            "update.num_updates, or lower update.learning_rate"
        )
    if adapter.changes_nothing:
        return (
            f"no optimiser step before update {best['update']} changed the adapter; raise update.learning_rate, or "
            "see `guards/` among the metrics for NaN and infinity"
        )
    return None


def _read_record(path: Path) -> TrainingRecord:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return TrainingRecord(**{**fields, "base": Base(**fields["base"])})
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `python -m sfgrpo train` writes it") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is no record of a training by this version ({error}); `python -m sfgrpo train` writes one"
        ) from error
