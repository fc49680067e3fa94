"""Runs the study, as many runs at once as there are cores, and writes its report: `python -m flows.study [PRESET]`."""

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
from tasks.study import train_run, write_report
from tasks.supervisor import stop_all

NUM_RUNS = os.cpu_count() or 1
"""Runs at once, with one thread each: more images per second than threads that share a run."""


@flow(name="study", task_runner=ThreadPoolTaskRunner(max_workers=NUM_RUNS))  # type: ignore[arg-type]
def study(preset: str = "short") -> None:
    """Train every row with every seed, then report; DVC skips the runs that are up to date."""
    refuse_inside_stage()
    plan = load_plan(preset)
    try:
        futures = [train_run.submit(plan.preset, row, seed) for seed in plan.seeds for row in plan.rows]
        wait(futures)
    except BaseException:
        stop_all()
        raise
    for future in futures:
        future.result()
    write_report(plan.preset)


def main(arguments: list[str]) -> int:
    """Run one preset and return the exit status."""
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
