"""The decision on a candidate: a file, an MLflow run and tags of the version."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sfgrpo.errors import RegistryError
from sfgrpo.paths import PROMOTION_DECISION
from sfgrpo.runtime.manifest import sha256_of_text

if TYPE_CHECKING:
    from mlflow import MlflowClient


Baseline = Literal["champion", "base model"]

PROMPTS = "evaluation_prompts.jsonl"
"""File of the decision's run: the prompts that both models drew."""
DECISION_TAG = "promotion/decision_sha256"
"""Tag of a decision's run: SHA-256 of its file. Files are in the artifact store and tags in the database, so whoever
can write only one of them makes no champion."""
RECORD_TAG = "promotion/record"
"""Tag of a version: how it was evaluated last, with its metrics in full precision, as JSON."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """How a version was evaluated, so that it can be evaluated in the same way again."""

    run_id: str
    """MLflow run of the decision, which keeps the prompts."""
    prompts_sha256: str
    protocol: Mapping[str, Any]
    """Fields of `SamplingProtocol`."""
    rewards: Sequence[Mapping[str, Any]]
    """Fields of `RewardConfig`, of the training reward and of the held-out one."""
    metrics: Mapping[str, float]
    """Of `Evaluation.to_dict`."""
    adapter_sha256: str | None = None
    """Of the version; None in records of earlier releases, and so is the next."""
    base_revision: str | None = None

    def subject(self) -> dict[str, str]:
        """Return the digests of what was evaluated, as far as they were recorded."""
        named = {"adapter_sha256": self.adapter_sha256, "base_revision": self.base_revision}
        return {name: digest for name, digest in named.items() if digest is not None}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromotionDecision:
    """Whether a version becomes champion, by which comparison, and after how many entries of the history."""

    model: str
    version: int
    promoted: bool
    sentence: str
    """The decision with its reasons, in Markdown."""
    failed: tuple[str, ...]
    """Gates that were not passed."""
    baseline: Baseline
    baseline_version: int | None
    """None for the base model."""
    num_entries: int
    """Entries of the promotion history when this was decided."""
    run_id: str | None
    """MLflow run of the decision; None where there was nothing to compare."""
    metrics: Mapping[str, float]
    """Of `Comparison.to_dict`, and the seconds of the phases."""
    evaluated: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What candidate and baseline were, of `EvaluationIdentity.to_dict`; decisions of earlier releases do not say."""
    decided_at: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    """ISO 8601, UTC."""

    def to_json(self) -> str:
        """Return the content of `decision.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PromotionDecision:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "failed": tuple(fields["failed"])})


def tag_version(client: MlflowClient, decision: PromotionDecision, record: EvaluationRecord) -> None:
    """Tag the candidate with the decision and its metrics."""
    number = decision.baseline_version
    tags = {
        "promotion/decision": "promoted" if decision.promoted else "not promoted",
        "promotion/failed": ", ".join(decision.failed) or "none",
        "promotion/baseline": decision.baseline if number is None else f"{decision.baseline}, version {number}",
        "promotion/decided_at": decision.decided_at,
        "promotion/run_id": record.run_id,
        RECORD_TAG: json.dumps(dataclasses.asdict(record)),
        **{key: repr(value) for key, value in decision.metrics.items() if key.startswith("promotion/")},
    }
    for key, value in tags.items():
        client.set_model_version_tag(decision.model, str(decision.version), key, value)


def read_record(address: str, tags: Mapping[str, str]) -> EvaluationRecord:
    """Read how a version was evaluated last; raise `RegistryError` if it never was."""
    if RECORD_TAG not in tags:
        raise RegistryError(
            f"{address} was never evaluated by `python -m sfgrpo promote`, so there are no metrics to compare with"
        )
    return EvaluationRecord(**json.loads(tags[RECORD_TAG]))


def read_decision(client: MlflowClient, run_id: str) -> PromotionDecision:
    """Read a decision from its MLflow run; raise `RegistryError` if there is none, or it is not what was decided."""
    text = read_file(run_id, PROMOTION_DECISION.name)
    expected, found = client.get_run(run_id).data.tags.get(DECISION_TAG), sha256_of_text(text)
    if found != expected:
        raise RegistryError(
            f"{PROMOTION_DECISION.name} of MLflow run {run_id} is not what was decided: expected sha256 {expected}, "
            f"found {found}; compare again by `python -m sfgrpo promote`"
        )
    return PromotionDecision.from_json(text)


def read_file(run_id: str, name: str) -> str:
    """Read a text file of an MLflow run; raise `RegistryError` if there is none."""
    import mlflow

    try:
        return mlflow.artifacts.load_text(f"runs:/{run_id}/{name}")
    except (mlflow.MlflowException, OSError) as error:
        raise RegistryError(f"MLflow run {run_id} holds no {name} of a promotion ({error})") from error
