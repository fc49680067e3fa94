"""The store of evaluations, by digests of all that shapes them: the same adapter is never evaluated twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.errors import IntegrityError
from sfgrpo.runtime.files import atomic_directory, write_json
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import verify_manifest, write_manifest

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfgrpo.evaluation.evaluate import Evaluation

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations"
"""Folder of the store, below the scratch folder."""
METRICS, SCORES, SAMPLES = "metrics.json", "scores.json", "samples.png"


def keep_evaluation(
    store: Path, key: str, evaluation: Evaluation, metrics: Mapping[str, float], samples: Image
) -> None:
    """Write metrics, the scores of every image and a grid of samples; whole or not at all."""
    scores = {"correct": evaluation.correct.tolist()}
    scores |= {name: values_PG.tolist() for name, values_PG in evaluation.rewards_PG.items()}
    with atomic_directory(store / key) as partial:
        write_json(partial / METRICS, metrics)
        (partial / SCORES).write_text(json.dumps(scores) + "\n", encoding="utf-8")
        samples.save(partial / SAMPLES)
        write_manifest(partial)


def is_evaluated(store: Path, key: str) -> bool:
    """Return whether the store has an evaluation, intact or not."""
    return (store / key).exists()


def read_metrics(store: Path, key: str) -> dict[str, float] | None:
    """Read the metrics of an evaluation; None if there is none or, with a warning, if it is damaged."""
    path = store / key
    if not path.exists():
        return None
    try:
        verify_manifest(path)
    except IntegrityError as error:
        logger.warning("the evaluation is done again: %s", error)
        return None
    metrics: dict[str, float] = json.loads((path / METRICS).read_text(encoding="utf-8"))
    return metrics


def claimed_evaluation(store: Path, key: str) -> AbstractContextManager[bool]:
    """Claim an evaluation for a block; yield False if another living process is doing it."""
    return exclusive_lock(store / f".{key}.claim")
