"""Promotion as Prefect tasks: the decision, which moves no alias, and its application, which is idempotent."""

from __future__ import annotations

import json
import sys
from typing import Any, cast

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from sfgrpo.paths import PROMOTION_DECISION, PROMOTION_TEXT
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.redaction import without_credentials
from tasks.stages import run_command, stage_task

PROMOTE = (sys.executable, "-m", "sfgrpo", "promote")


@stage_task("decide")
def decide(model: str | None = None, version: int | None = None) -> dict[str, Any]:
    """Compare a candidate with the champion; return the decision, as in `decision.json`, and the report."""
    PROMOTION_DECISION.unlink(missing_ok=True)
    options = [*(["--model", model] if model else []), *(["--version", str(version)] if version is not None else [])]
    run_command("promote", [*PROMOTE, "--judge-only", *options])
    decision = cast(dict[str, Any], json.loads(PROMOTION_DECISION.read_text(encoding="utf-8")))
    return {**decision, "report": PROMOTION_TEXT.read_text(encoding="utf-8")}


@stage_task("apply", "apply decision {run_id}")
def apply(run_id: str) -> None:
    """Make the candidate of a decision champion, after its files were verified and it has drawn an image.

    After a crash it can be repeated: the promotion history says what was done already.
    """
    run_command("promote", [*PROMOTE, "--apply", run_id])


def show_decision(decision: dict[str, Any]) -> None:
    """Show the report of a decision in Prefect's UI, with a link to the version if MLflow has a server."""
    create_markdown_artifact(decision["report"], key="promotion", description="Candidate against champion")
    server = without_credentials(read_environment().tracking_uri)
    if server.startswith(("http://", "https://")):
        create_link_artifact(
            f"{server.rstrip('/')}/#/models/{decision['model']}/versions/{decision['version']}",
            link_text=f"{decision['model']}, version {decision['version']}",
            key="promotion-version",
            description="The version that was evaluated, with its metrics as tags",
        )


def promote_version(model: str | None = None, version: int | None = None) -> dict[str, Any]:
    """Evaluate a candidate and make it champion if it passes; return the decision.

    Both models are evaluated on the evaluation prompts of the working directory.
    """
    decision = decide(model, version)
    show_decision(decision)
    if decision["promoted"]:
        apply(decision["run_id"])
    return decision
