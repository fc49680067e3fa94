"""The maintenance commands of sfgrpo as Prefect tasks: recheck, stale runs, retention."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from sfgrpo.paths import RECHECK
from tasks.stages import run_command, stage_task


@stage_task("recheck")
def recheck() -> dict[str, Any]:
    """Evaluate the champion again; return whether it drifted, and the table of both evaluations."""
    RECHECK.unlink(missing_ok=True)
    run_command("recheck", [sys.executable, "-m", "sfgrpo", "recheck"])
    return cast(dict[str, Any], json.loads(RECHECK.read_text(encoding="utf-8")))


@stage_task("close stale runs")
def close_stale_runs() -> dict[str, Any]:
    """Close the MLflow runs of dead processes; return the runs at work, closed and silent."""
    return _run_with_report("close-stale-runs")


@stage_task("retention")
def remove_finished(days: float, rehearsal: bool) -> dict[str, Any]:
    """Remove the state of trainings that finished so many days ago; return what was removed and what is kept."""
    return _run_with_report("retention", "--days", str(days), *(["--rehearse"] if rehearsal else []))


def _run_with_report(command: str, *options: str) -> dict[str, Any]:
    """Run a command of sfgrpo that writes a report as JSON; return the report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run_command(command, [sys.executable, "-m", "sfgrpo", command, *options, "--report", str(report)])
        return cast(dict[str, Any], json.loads(report.read_text(encoding="utf-8")))
