"""Run the study, as many runs at once as there are cores, and write its report: `python -m flows.study [PRESET]`."""

from __future__ import annotations

import os
import sys

from prefect import flow
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from sfgrpo.study.config import load_plan
from tasks.program import flow_as_program
from tasks.stages import refuse_inside_stage
from tasks.study import train_run, write_report
from tasks.supervisor import stop_all

NUM_RUNS = os.cpu_count() or 1
"""Runs at once, with one thread each: more images per second than threads that share a run."""


# Prefect types its runners as ones of PrefectConcurrentFuture, and `flow` takes none but those of PrefectFuture.
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


if __name__ == "__main__":
    with flow_as_program():
        study(*sys.argv[1:2])
