"""Draws with the champion of the registry again, and fails when it is no longer what was promoted."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from tasks.maintenance import recheck
from tasks.stages import refuse_inside_stage
from tasks.worktree import own_workspace


class ChampionDriftedError(RuntimeError):
    """The champion draws otherwise than it did when it was promoted."""


@flow(name="watch-champion")
def watch_champion() -> None:
    """Compares what the champion draws with what was recorded when it was promoted; fails when the two differ."""
    refuse_inside_stage()
    with own_workspace({}):
        found = recheck()
    create_markdown_artifact(found["table"], key="champion", description="The champion at its promotion and now")
    if found["drifted"]:
        raise ChampionDriftedError(
            "the champion draws otherwise than when it was promoted; see the artifact `champion`, and look for what "
            "changed: packages, hardware, or the files of the version"
        )
