"""Paths that the stages read and write, relative to the working directory."""

from __future__ import annotations

from pathlib import Path

PARAMS = "params.yaml"
PROMPTS = Path("data/prompts")
TRAINING_PROMPTS = PROMPTS / "train.jsonl"
VALIDATION_PROMPTS = PROMPTS / "validation.jsonl"
EVALUATION_PROMPTS = PROMPTS / "evaluation.jsonl"
POLICY = Path("models/policy")
TRAIN_REPORT = Path("reports/train")
EVALUATE_REPORT = Path("reports/evaluate")
TRAINING = Path("reports/training.json")
"""Record of the run that was trained last in this working directory; no output of DVC."""
REGISTRATION = Path("reports/registered.json")
PROMOTION_REPORT = Path("reports/promotion")
PROMOTION_DECISION = PROMOTION_REPORT / "decision.json"
PROMOTION_TEXT = PROMOTION_REPORT / "report.md"
RECHECK = Path("reports/recheck.json")
RUN_PREFIX = "train-"
"""Prefix of the folders of trainings in the scratch folder; the start of the run's key follows."""


def run_lock(folder: Path) -> Path:
    """Return the file, beside the folder of a run, that is locked by whoever trains or removes the run."""
    return folder.with_name(f".{folder.name}.lock")
