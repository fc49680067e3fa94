"""End the MLflow runs of dead processes and list silent ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import write_json
from sfgrpo.tracking import stale_runs


def close_stale_runs(environment: Environment, quiet_s: float, report: Path | None = None) -> None:
    """Close the runs of processes that died on this machine; print the findings, and write them to `report`."""
    found = stale_runs.close_stale_runs(environment, quiet_s)
    if report is not None:
        write_json(report, dataclasses.asdict(found))
    for run in found.closed:
        print(f"closed {run.name}: {run.owner} is gone")
    for run in found.silent:
        silence = f"no record for {run.silent_s / 3600:.1f} h"
        print(f"silent {run.name}: {silence} from {run.owner}, which cannot be seen from here")
    print(f"runs at work {len(found.at_work)}, closed {len(found.closed)}, silent {len(found.silent)}")
