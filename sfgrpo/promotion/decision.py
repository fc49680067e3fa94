"""What was decided on a candidate: as a file, as a run in MLflow, and as tags of the version."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.paths import PROMOTION_DECISION, PROMOTION_TEXT
from sfgrpo.promotion.gates import Baseline
from sfgrpo.registry.register import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient


DECISION = PROMOTION_DECISION.name
REPORT = PROMOTION_TEXT.name
SAMPLES = "samples.png"
PROMPTS = "evaluation_prompts.jsonl"
"""File of the decision's run: the prompts that both models drew."""
RECORD_TAG = "promotion/record"
"""Tag of a version: how it was judged last, and its own figures in full precision, as JSON."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """How a version was judged, so that it can be judged in the same way again."""

    run_id: str
    """MLflow run of the decision, which keeps the prompts."""
    prompts_sha256: str
    protocol: Mapping[str, Any]
    """Fields of `SamplingProtocol`."""
    rewards: tuple[Mapping[str, Any], ...]
    """Fields of `RewardConfig`, of the training reward and of the held-out one."""
    metrics: Mapping[str, float]
    """Of `Evaluation.to_dict`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromotionDecision:
    """Whether a version is to be champion, by which comparison, and after which entry of the ledger."""

    model: str
    version: int
    promoted: bool
    sentence: str
    """The verdict with its reasons, in Markdown."""
    failed: tuple[str, ...]
    """Gates that were not passed."""
    opponent: Baseline
    opponent_version: int | None
    """None for the base model."""
    num_entries: int
    """Entries of the ledger when this was decided."""
    run_id: str | None
    """MLflow run of the decision; None where there was nothing to compare."""
    decided_at: str
    """ISO 8601, UTC."""
    metrics: Mapping[str, float]
    """Of `Decision.to_dict`, and the seconds of the phases."""

    def to_json(self) -> str:
        """Writes the judgement as the file `decision.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PromotionDecision:
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "failed": tuple(fields["failed"])})


def tag_version(client: MlflowClient, judgement: PromotionDecision, record: EvaluationRecord) -> None:
    """Puts the decision with its figures on the version that was judged."""
    tags = {
        "promotion/decision": "promoted" if judgement.promoted else "not promoted",
        "promotion/failed": ", ".join(judgement.failed) or "none",
        "promotion/opponent": _opponent(judgement),
        "promotion/decided_at": judgement.decided_at,
        "promotion/run_id": record.run_id,
        RECORD_TAG: json.dumps(dataclasses.asdict(record)),
        **{key: repr(value) for key, value in judgement.metrics.items() if key.startswith("promotion/")},
    }
    for key, value in tags.items():
        client.set_model_version_tag(judgement.model, str(judgement.version), key, value)


def read_record(address: str, tags: Mapping[str, str]) -> EvaluationRecord:
    """Reads how a version was judged last.

    Raises:
        RegistryError: it never was.
    """
    if RECORD_TAG not in tags:
        raise RegistryError(
            f"{address} was never judged by `python -m sfgrpo promote`, so there are no figures to compare with"
        )
    fields = json.loads(tags[RECORD_TAG])
    return EvaluationRecord(**{**fields, "rewards": tuple(fields["rewards"])})


def read_judgement(client: MlflowClient, run_id: str) -> PromotionDecision:
    """Reads a decision from its MLflow run.

    Raises:
        RegistryError: there is no such run, or it holds no decision.
    """
    return PromotionDecision.from_json(read_file(client, run_id, DECISION))


def read_file(client: MlflowClient, run_id: str, name: str) -> str:
    """Reads a text file of an MLflow run.

    Raises:
        RegistryError: there is no such run or file.
    """
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            raise RegistryError(f"MLflow run {run_id} holds no {name} of a promotion ({error})") from error


def _opponent(judgement: PromotionDecision) -> str:
    number = judgement.opponent_version
    return judgement.opponent if number is None else f"{judgement.opponent}, version {number}"
