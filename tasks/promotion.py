"""Promotion as Prefect tasks: the decision, which moves nothing, and its application, which may be repeated."""

from __future__ import annotations

import json
import sys
from typing import Any, cast

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from sfgrpo.paths import PROMOTION_DECISION, PROMOTION_TEXT
from sfgrpo.runtime.environment import read_environment
from tasks.stages import run_command, stage_task

PROMOTE = (sys.executable, "-m", "sfgrpo", "promote")


@stage_task("judge")
def judge(model: str | None = None, version: int | None = None) -> dict[str, Any]:
    """Compares a candidate with the champion; returns the decision, as in `decision.json`, and the report."""
    PROMOTION_DECISION.unlink(missing_ok=True)
    options = [*(["--model", model] if model else []), *(["--version", str(version)] if version else [])]
    run_command("promote", [*PROMOTE, "--judge-only", *options])
    judgement = cast(dict[str, Any], json.loads(PROMOTION_DECISION.read_text(encoding="utf-8")))
    return {**judgement, "report": PROMOTION_TEXT.read_text(encoding="utf-8")}


@stage_task("apply", "apply decision {run_id}")
def apply(run_id: str) -> None:
    """Makes the candidate of a decision champion, has it draw, and takes it back if it cannot.

    Repeated after a crash it goes on where that one stopped, since the ledger of champions knows.
    """
    run_command("promote", [*PROMOTE, "--apply", run_id])


def show_decision(judgement: dict[str, Any]) -> None:
    """Puts the report of a decision into Prefect's UI, with a link to the version if MLflow has a server."""
    create_markdown_artifact(judgement["report"], key="promotion", description="Candidate against champion")
    server = read_environment().tracking_uri
    if server.startswith(("http://", "https://")):
        create_link_artifact(
            f"{server.rstrip('/')}/#/models/{judgement['model']}/versions/{judgement['version']}",
            link_text=f"{judgement['model']}, version {judgement['version']}",
            key="promotion-version",
            description="The version that was judged, with all figures as its tags",
        )


def promote_version(model: str | None = None, version: int | None = None) -> dict[str, Any]:
    """Judges a candidate and makes it champion if it passes; for flows that have just registered one.

    It works in the current folder, whose evaluation prompts both models draw.
    """
    judgement = judge(model, version)
    show_decision(judgement)
    if judgement["promoted"]:
        apply(judgement["run_id"])
    return judgement
