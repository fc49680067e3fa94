"""Saving a training and going on from its newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.checkpoint.state import (
    CHECKPOINTS,
    TrainingState,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    state_of,
    update_of,
)
from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.evaluation.periodic import PeriodicEvaluation
from sfgrpo.grpo.distributed import highest, require_same_everywhere, shared_files
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.training.learner import Learner

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes and restores the checkpoints of a run; all processes call it together, the main process writes."""

    def __init__(
        self,
        folder: Path,
        config: TrainStage,
        learner: Learner,
        evaluations: PeriodicEvaluation,
        accelerator: Accelerator,
        on_checkpoint: Callable[[], None],
    ) -> None:
        """Take the run's folder, what a checkpoint holds, and what the main process calls after writing one."""
        self._folder, self._config, self._learner, self._evaluations = folder, config, learner, evaluations
        self._accelerator, self._on_checkpoint = accelerator, on_checkpoint
        self._saved: tuple[int, int] | None = None
        """Updates and evaluations of the newest checkpoint."""

    def save(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write a checkpoint of everything that the rest of the run depends on, unless the newest one is it."""
        done = len(history), len(self._evaluations.results)
        if self._saved == done:
            return
        require_same_everywhere(self._learner.policy.adapter_parameters(), self._accelerator)
        self._saved = done
        if not self._accelerator.is_main_process:
            return
        state = TrainingState(
            update_index=len(history),
            **self._learner.state(),
            rng={"torch": torch.get_rng_state()},
            config=to_flat_dict(self._config),
            history=history,
            best=_read_best(self._folder),
            extra=self._evaluations.state(),
        )
        save_checkpoint(self._folder / CHECKPOINTS, state, self._config.checkpoint.keep)
        self._evaluations.prune()
        self._on_checkpoint()

    def restore(self) -> list[dict[str, Any]]:
        """Go back to the newest checkpoint; return the metrics of all updates so far, none without a checkpoint."""
        state = self._newest_state()
        if state is None:
            return []
        self._learner.load(state)
        torch.set_rng_state(torch.as_tensor(state.rng["torch"]))
        self._evaluations.load(state.extra)
        self._saved = state.update_index, len(self._evaluations.results)
        if self._accelerator.is_main_process:
            _restore_best(state.best, self._folder)
        logger.info("resuming after update %d", state.update_index)
        return [dict(metrics) for metrics in state.history]

    def _newest_state(self) -> TrainingState | None:
        """Read the newest checkpoint that any process finds on its disk; None when there is none."""
        path = latest_checkpoint(self._folder / CHECKPOINTS)
        found = -1 if path is None else update_of(path)
        newest = round(highest([found], self._accelerator)[0])
        if newest < 0:
            return None
        files = read_checkpoint(path) if path is not None and found == newest else None
        return state_of(shared_files(files, self._accelerator))


def _read_best(folder: Path) -> dict[str, Tensor]:
    """Read the files of the best adapter so far as uint8 tensors; none without one."""
    files = sorted((folder / "best").glob("*"))
    return {file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files}


def _restore_best(files: Mapping[str, Tensor], folder: Path) -> None:
    """Write the files of the best adapter, if there are any."""
    if files:
        with atomic_directory(folder / "best") as partial:
            for name, content in files.items():
                (partial / name).write_bytes(content.numpy().tobytes())
