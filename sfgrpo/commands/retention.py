"""Remove the resumable state of finished trainings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import write_json
from sfgrpo.storage.retention import remove_finished


def retention(environment: Environment, days: float, report: Path | None = None, *, rehearsal: bool = False) -> None:
    """Remove the state of trainings that finished `days` ago; print what it was, and write it to `report`."""
    done = remove_finished(environment, days, rehearsal=rehearsal)
    if report is not None:
        write_json(report, dataclasses.asdict(done))
    verb = "would remove" if rehearsal else "removed"
    for removed in done.removed:
        print(f"{verb} {removed.place}: {removed.num_bytes / 1e6:.1f} MB")
    print(f"{verb} {len(done.removed)} places, {sum(each.num_bytes for each in done.removed) / 1e6:.1f} MB in all")
