"""Trains a policy, compares it with its base model and registers it: `python -m flows.train_policy`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from sfgrpo.signals import sigterm_as_exit
from tasks.evaluations import evaluations_reported
from tasks.stages import StageError, evaluate, prompts, register, train

TABLE = Path("reports/evaluate/table.md")
SAMPLES = Path("reports/evaluate/samples.png")


@flow(name="train-policy")
def train_policy() -> dict[str, Any]:
    """Runs the pipeline from prompts to model version; returns name, number and alias of the version."""
    refuse_inside_stage()
    prompts()
    with evaluations_reported():
        train()
    evaluate()
    version: dict[str, Any] = register()
    create_markdown_artifact(report(version), key="geneval", description="GenEval before and after training")
    return version


def refuse_inside_stage() -> None:
    """Raises if DVC runs this process: the stages that the flow starts would wait for the one that started it."""
    if stage := os.environ.get("DVC_STAGE"):
        raise RuntimeError(f"DVC stage {stage} started the flow, which would wait for that stage; start it by itself")


def report(version: dict[str, Any]) -> str:
    """Words the outcome in Markdown."""
    return (
        f"{TABLE.read_text(encoding='utf-8').strip()}\n\n"
        f"Samples before and after: {SAMPLES}\n\n"
        f"model version {version['version']} registered: {version['name']}@{version['alias']}"
    )


def main() -> int:
    """Runs the flow; prints the outcome, or the failed stage's own last lines, and returns the exit status."""
    try:
        # Prefect passes the signal on once the flow has ended; as an exit it also ends the temporary server.
        with sigterm_as_exit():
            version = train_policy()
    except StageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{report(version)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
