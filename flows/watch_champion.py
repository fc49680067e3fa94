"""Evaluate the champion again, and fail when it is no longer what was promoted."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from tasks.maintenance import recheck
from tasks.stages import refuse_inside_stage
from tasks.worktree import run_worktree


class ChampionDriftedError(RuntimeError):
    """The champion's images differ from those of its promotion."""


@flow(name="watch-champion")
def watch_champion() -> None:
    """Compare the champion's images with those recorded at its promotion; fail when they differ."""
    refuse_inside_stage()
    with run_worktree({}):
        found = recheck()
    create_markdown_artifact(found["table"], key="champion", description="The champion at its promotion and now")
    if found["drifted"]:
        raise ChampionDriftedError(
            "the champion's images differ from those of its promotion; see the artifact `champion`, and look for what "
            "changed: packages, hardware, or the files of the version"
        )
