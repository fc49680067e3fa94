"""The study as Prefect tasks: its runs and its report are stages of experiments/dvc.yaml."""

from __future__ import annotations

from tasks.stages import reproduce, stage_task

STAGES = "experiments/dvc.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1"}


@stage_task("study-run", "{row} seed {seed}")
def train_run(preset: str, row: str, seed: int) -> None:
    """Train one row with one seed; a retry resumes from the last checkpoint."""
    reproduce(f"{preset}@{row}-{seed}", STAGES, ONE_THREAD)


@stage_task("study-report")
def write_report(preset: str) -> None:
    """Write the report on all runs."""
    reproduce(f"{preset}-report", STAGES, ONE_THREAD)
