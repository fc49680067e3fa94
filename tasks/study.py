"""The study as Prefect tasks: its cells and its report are stages of experiments/dvc.yaml."""

from __future__ import annotations

from tasks.stages import reproduce, stage_task

STAGES = "experiments/dvc.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1"}


@stage_task("cell", "{row} seed {seed}")
def cell(form: str, row: str, seed: int) -> None:
    """Trains one row with one seed; a retry goes on from the last checkpoint."""
    reproduce(f"{form}@{row}-{seed}", STAGES, ONE_THREAD)


@stage_task("report")
def report(form: str) -> None:
    """Writes the report on all cells."""
    reproduce(f"{form}-report", STAGES, ONE_THREAD)
