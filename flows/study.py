"""Runs the study, as many cells at once as there are cores, and writes its report: `python -m flows.study [FORM]`."""

from __future__ import annotations

import os
import sys

from prefect import flow
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.shutdown import sigterm_as_exit
from sfgrpo.study.config import load_plan
from tasks.stages import StageError, refuse_inside_stage
from tasks.study import cell, report
from tasks.supervisor import stop_all

NUM_CELLS = os.cpu_count() or 1
"""Cells that run at once, with one thread each: that gives more images per second than threads that share a cell."""


@flow(name="study", task_runner=ThreadPoolTaskRunner(max_workers=NUM_CELLS))  # type: ignore[arg-type]
def study(form: str = "short") -> None:
    """Trains every row with every seed, then reports; cells that are up to date are not trained again."""
    refuse_inside_stage()
    plan = load_plan(form)
    try:
        futures = [cell.submit(plan.form, row, seed) for seed in plan.seeds for row in plan.rows]
        wait(futures)
    except BaseException:
        stop_all()
        raise
    for future in futures:
        future.result()
    report(plan.form)


def main(arguments: list[str]) -> int:
    """Runs one form; returns the exit status."""
    try:
        # Prefect passes the signal on once the flow has ended; as an exit it also ends the temporary server.
        with sigterm_as_exit():
            study(*arguments[:1])
    except (StageError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
