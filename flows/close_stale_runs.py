"""Close the MLflow runs of dead processes and end orphaned ones: `python -m flows.close_stale_runs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from sfgrpo.preflight.checkout import find_checkout
from sfgrpo.runtime.environment import read_environment
from tasks import maintenance
from tasks.program import flow_as_program
from tasks.stages import refuse_inside_stage
from tasks.supervisor import end_orphans, marked_folders


@flow(name="close-stale-runs")
def close_stale_runs() -> None:
    """Close the MLflow runs of dead processes, and end the processes that dead supervisors of this checkout left."""
    refuse_inside_stage()
    checkout, grace_s = find_checkout(Path.cwd()), read_environment().grace_s
    folders = sorted(folder for folder in marked_folders() if folder.is_relative_to(checkout))
    ended = [pid for folder in folders for pid in end_orphans(folder, grace_s)]
    if ended:
        get_run_logger().warning("ended processes of killed runs: %s", ended)
    found = maintenance.close_stale_runs()
    create_markdown_artifact(report(found, ended), key="stale-runs", description="Stale runs and orphaned processes")


def report(found: dict[str, Any], ended: Sequence[int]) -> str:
    """Return the findings as Markdown."""
    counts = ", ".join(f"{kind.replace('_', ' ')} {len(runs)}" for kind, runs in found.items())
    lines = [
        f"MLflow runs that said RUNNING: {counts}. Processes ended: {len(ended)}.",
        "",
        "| Run | Process | Hours without a record | What was done |",
        "|---|---|---:|---|",
    ]
    done = {"closed": "closed as KILLED, since its process is gone", "silent": "nothing: its process is out of sight"}
    lines += [
        f"| {run['name']} `{run['run_id']}` | {run['owner']} | {run['silent_s'] / 3600:.1f} | {action} |"
        for kind, action in done.items()
        for run in found[kind]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with flow_as_program():
        close_stale_runs()
