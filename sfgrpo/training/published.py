"""What a training publishes: its best and its last adapter, and the record of what they were trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfgrpo.errors import AdapterError, ConfigError, MismatchError
from sfgrpo.policies.adapter import TRAIN_AGAIN, Adapter, Base, read_adapter, require_base

ADAPTER, LAST_ADAPTER, RECORD = "adapter", "last_adapter", "training.json"
"""Names below the folder of a published policy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """A training and the adapters that it published."""

    update: int
    """Updates that the best adapter has seen: the best of all that were evaluated on the validation prompts."""
    num_updates: int
    """Updates of the training, which are those of the last adapter."""
    images: int
    run_key: str
    mlflow_run_id: str | None
    tracking_uri: str
    adapter_sha256: str
    """Of the best adapter."""
    last_adapter_sha256: str
    base: Base
    training_prompts_sha256: str
    validation_prompts_sha256: str
    """Prompts by which the best adapter was selected."""
    evaluation_prompts_sha256: str
    """Prompts that were kept out of the training and of the selection."""
    nothing_changed: str | None
    """Why, where the training has left the policy as it was."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPolicy:
    """A record, with the adapters that it is of."""

    record: TrainingRecord
    adapter: Adapter
    """The best one, which is registered."""
    last: Adapter
    """The one after the last update, which may be the same."""

    @property
    def last_is_best(self) -> bool:
        """Whether the two adapters are the same bytes."""
        return self.last.sha256 == self.adapter.sha256


def read_published(folder: Path) -> PublishedPolicy:
    """Read what a training has published in a folder.

    Raises:
        ConfigError: A file is absent or unusable.
        MismatchError: Record and adapters are of two trainings.
        AdapterError: An adapter is unusable, or the best one changes nothing.
    """
    record = _read_record(folder / RECORD)
    adapter, last = (
        _read_adapter_of(folder / name, sha256, record)
        for name, sha256 in ((ADAPTER, record.adapter_sha256), (LAST_ADAPTER, record.last_adapter_sha256))
    )
    if adapter.changes_nothing or record.nothing_changed is not None:
        reason = record.nothing_changed or f"the adapter of update {record.update} leaves every layer as it is"
        raise AdapterError(f"{adapter.path} changes nothing, so there is nothing to evaluate or register: {reason}")
    return PublishedPolicy(record=record, adapter=adapter, last=last)


def _read_adapter_of(folder: Path, sha256: str, record: TrainingRecord) -> Adapter:
    """Read an adapter; raise unless it is the one that the record names."""
    adapter = read_adapter(folder)
    if adapter.sha256 != sha256:
        raise MismatchError(
            f"{adapter.path} has the SHA-256 {adapter.sha256}, and {folder.with_name(RECORD)} is of the adapter "
            f"{sha256}; {TRAIN_AGAIN}"
        )
    require_base(adapter, record.base)
    return adapter


def reason_of_no_change(
    history: Sequence[Mapping[str, Any]], best: Mapping[str, Any], selected_by: str, adapter: Adapter
) -> str | None:
    """Return in words why a training has changed nothing; None if it has changed the policy.

    Args:
        history: Metrics of all updates.
        best: Update and metrics of the evaluation whose adapter is published.
        selected_by: The metric that is the best one's.
        adapter: The published adapter.
    """
    if history and all(metrics.get("groups/constant_fraction") == 1.0 for metrics in history):
        return (
            f"in none of the {len(history)} updates did the images of a prompt get different rewards; use a reward "
            "that tells them apart, or raise rollout.group_size or sampling.noise_level"
        )
    if best["update"] == 0:
        score = best["metrics"][selected_by]
        return (
            f"every evaluation was worse than that before the first update, {selected_by} {score:.3f}; train longer by "
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
