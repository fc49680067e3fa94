"""The study as Prefect tasks: its runs and its report are stages of experiments/dvc.yaml."""

from __future__ import annotations

from tasks.stages import dvc_repro, run_command, stage_task

STAGES = "experiments/dvc.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1"}


@stage_task("study-run", "{row} seed {seed}")
def train_run(preset: str, row: str, seed: int) -> None:
    """Train one row with one seed; a retry resumes from the last checkpoint."""
    stage = f"{preset}@{row}-{seed}"
    run_command(stage, dvc_repro(stage, STAGES), ONE_THREAD)


@stage_task("study-report")
def write_report(preset: str) -> None:
    """Write the report on all runs."""
    stage = f"{preset}-report"
    run_command(stage, dvc_repro(stage, STAGES), ONE_THREAD)
