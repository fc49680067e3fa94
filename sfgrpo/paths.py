"""Where the stages read and write, below the working directory."""

from __future__ import annotations

from pathlib import Path

PARAMS = "params.yaml"
PROMPTS = Path("data/prompts")
TRAINING_PROMPTS = PROMPTS / "train.jsonl"
EVALUATION_PROMPTS = PROMPTS / "evaluation.jsonl"
POLICY = Path("models/policy")
TRAIN_REPORT = Path("reports/train")
EVALUATE_REPORT = Path("reports/evaluate")
TRAINING = Path("reports/training.json")
"""Names the run that was trained last in this working directory; no output of DVC."""
REGISTRATION = Path("reports/registered.json")
