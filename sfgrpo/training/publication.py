"""Publication of a training: its adapters, their record and its reports, where the pipeline expects them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from sfgrpo import factory
from sfgrpo.config.stages import TrainStage
from sfgrpo.paths import POLICY, TRAIN_REPORT
from sfgrpo.policies.adapter import read_adapter
from sfgrpo.prompts import prompts_digest
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory, write_json
from sfgrpo.runtime.redaction import without_credentials
from sfgrpo.tracking.base import Tracker
from sfgrpo.training.fingerprint import Run
from sfgrpo.training.published import ADAPTER, LAST_ADAPTER, RECORD, TrainingRecord, reason_of_no_change
from sfgrpo.training.trainer import Trainer


def publish(trainer: Trainer, config: TrainStage, environment: Environment, run: Run, tracker: Tracker) -> None:
    """Write best adapter, last adapter and reports to where the pipeline expects them, and say what they are of."""
    adapter, best = read_adapter(run.folder / "best"), trainer.best
    # The record names the MLflow run, so the run has to be there.
    tracker.open()
    with atomic_directory(POLICY) as partial:
        shutil.copytree(run.folder / "best", partial / ADAPTER)
        (partial / LAST_ADAPTER).mkdir()
        trainer.save_averaged(partial / LAST_ADAPTER)
        last = read_adapter(partial / LAST_ADAPTER)
        record = TrainingRecord(
            update=best["update"],
            num_updates=trainer.update_index,
            images=trainer.update_index * config.rollout.num_images,
            run_key=run.key,
            mlflow_run_id=tracker.run_id,
            tracking_uri=without_credentials(environment.tracking_uri),
            adapter_sha256=adapter.sha256,
            last_adapter_sha256=last.sha256,
            base=factory.base_of(config.policy),
            training_prompts_sha256=prompts_digest(run.prompts),
            validation_prompts_sha256=prompts_digest(run.validation_prompts),
            evaluation_prompts_sha256=prompts_digest(run.evaluation_prompts),
            nothing_changed=reason_of_no_change(trainer.history, best, trainer.selected_by, adapter),
        )
        write_json(partial / RECORD, dataclasses.asdict(record))
    _write_report(trainer, record, run.folder)
    # One number to sort runs by: each further one would get a chart, ahead of the others.
    tracker.log_metrics({"best/geneval/overall": best["metrics"]["geneval/overall"]}, trainer.update_index)
    tracker.set_tags(
        {
            "best_update": str(best["update"]),
            "adapter_sha256": record.adapter_sha256,
            "base_revision": record.base.revision,
            "nothing_changed": record.nothing_changed or "no",
        }
    )
    print(
        f"best of {len(trainer.evaluations)} evaluations on validation prompts, by {trainer.selected_by}: update "
        f"{best['update']}, adapter in {POLICY}"
    )
    if record.nothing_changed is not None:
        print(f"the training has changed nothing, and `register` will refuse it: {record.nothing_changed}")


def _write_report(trainer: Trainer, record: TrainingRecord, folder: Path) -> None:
    evaluations = [{"update": evaluation["update"], **evaluation["metrics"]} for evaluation in trainer.evaluations]
    with atomic_directory(TRAIN_REPORT) as partial:
        write_json(partial / "history.json", trainer.history)
        write_json(partial / "evaluations.json", evaluations)
        summary = {"best_update": record.update, "adapter_sha256": record.adapter_sha256, **trainer.best["metrics"]}
        write_json(partial / "summary.json", summary)
        for grid in sorted(folder.glob("samples_*.png")):
            shutil.copy(grid, partial / grid.name)
