"""What keeps the pipeline clean and its champion watched, as Prefect tasks around the commands of sfgrpo."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from tasks.stages import run_command, stage_task

RECHECK = Path("reports/recheck.json")
"""Written by `python -m sfgrpo recheck`."""


@stage_task("recheck")
def recheck() -> dict[str, Any]:
    """Draws with the champion again; returns whether it drifted, and the table of both drawings."""
    RECHECK.unlink(missing_ok=True)
    run_command("recheck", [sys.executable, "-m", "sfgrpo", "recheck"])
    return cast(dict[str, Any], json.loads(RECHECK.read_text(encoding="utf-8")))


@stage_task("close stale runs")
def close_stale_runs() -> dict[str, Any]:
    """Close the MLflow runs of dead processes; return the runs at work, closed and silent."""
    return _reported("close_stale_runs")


@stage_task("retention")
def remove_finished(days: float, rehearsal: bool) -> dict[str, Any]:
    """Removes what trainings left that are finished for so many days; returns what was removed and what has to stay."""
    return _reported("retention", "--days", str(days), *(["--rehearse"] if rehearsal else []))


def _reported(command: str, *options: str) -> dict[str, Any]:
    """Runs a command of sfgrpo that writes its findings to a file; returns them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run_command(command, [sys.executable, "-m", "sfgrpo", command, *options, "--report", str(report)])
        return cast(dict[str, Any], json.loads(report.read_text(encoding="utf-8")))
