"""Batch arithmetic of a training: every number that follows from the parameters."""

from __future__ import annotations

import dataclasses

from sfgrpo.config.stages import TrainStage, batch_conflicts
from sfgrpo.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchArithmetic:
    """Batch sizes and passes of one update on each of `num_processes` processes; a group may span processes."""

    config: TrainStage
    num_processes: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers of processes and micro-batch sizes that do not divide the work."""
        rollout, steps = self.config.rollout, self.config.update.steps_per_update
        product = f"{rollout.prompts_per_update} * {rollout.group_size}"
        if rollout.num_images % (self.num_processes * steps):
            raise ConfigError(
                f"processes * update.steps_per_update = {self.num_processes} * {steps} = {self.num_processes * steps} "
                f"does not divide rollout.prompts_per_update * rollout.group_size = {product} = {rollout.num_images}; "
                "every process takes as many images of every optimiser step as any other, so change one of these"
            )
        if conflicts := list(batch_conflicts(self.config, self.num_processes)):
            raise ConfigError("\n".join(conflicts))

    @property
    def images_per_process(self) -> int:
        """Images that one process samples per update."""
        return self.config.rollout.num_images // self.num_processes

    @property
    def images_per_optimiser_step(self) -> int:
        """Images that one process contributes to an optimiser step."""
        return self.images_per_process // self.config.update.steps_per_update

    @property
    def rollout_micro_batch(self) -> int:
        """Images that are denoised together: as many as allowed, but never those of two optimiser steps."""
        return min(self.config.rollout.micro_batch_size, self.images_per_optimiser_step)

    @property
    def update_micro_batch(self) -> int:
        """Images of one backward pass."""
        return min(self.config.update.micro_batch_size, self.images_per_optimiser_step)

    @property
    def rollout_micro_batches(self) -> int:
        """Micro-batches of one process's rollout."""
        return self.images_per_process // self.rollout_micro_batch

    @property
    def accumulation_steps(self) -> int:
        """Backward passes whose gradients add up to one optimiser step."""
        return self.images_per_optimiser_step // self.update_micro_batch

    @property
    def estimate_passes(self) -> float:
        """Transformer passes per image for the clean estimates, in addition to those of the rollout.

        The first velocity of a state is known from the rollout, and substeps are capped by the remaining steps. The
        start state is shared, so its passes count once per group.
        """
        num_steps, substeps = self.config.sampling.num_steps, self.config.estimates.num_substeps
        extra = {
            state: min(substeps, num_steps - state) - 1 for state in self.config.scored_states if state < num_steps
        }
        return sum(extra.values()) - extra.get(0, 0) * (1 - 1 / self.config.rollout.group_size)

    def explain(self) -> str:
        """Format the batch sizes, one line a phase, and list parameters without effect."""
        config, rollout, update = self.config, self.config.rollout, self.config.update
        steps, guided = config.trained_steps, config.sampling.guidance_scale > 1
        return "\n".join(
            (
                f"run         {update.num_updates} updates x {rollout.num_images} images "
                f"= {update.num_updates * rollout.num_images:,} images on {self.num_processes} process(es)",
                f"rollout     {rollout.prompts_per_update} x {rollout.group_size} = {rollout.num_images} images; "
                f"per process {self.images_per_process} = {self.rollout_micro_batches} x {self.rollout_micro_batch}, "
                f"{config.sampling.num_steps} steps each",
                f"update      {update.steps_per_update} optimiser steps x {self.images_per_optimiser_step} images per "
                f"process = {self.accumulation_steps} x {self.update_micro_batch}; trains steps {_format_steps(steps)}",
                f"passes      per image {config.sampling.num_steps} rollout + {self.estimate_passes:.3g} estimates "
                f"+ {len(steps)} forward and backward{', twice each for guidance' if guided else ''}",
                f"checkpoint  every {config.checkpoint.every_num_updates} updates, "
                f"evaluation every {config.evaluation.every_num_updates}",
                *(f"no effect   {path}" for path in self._without_effect()),
            )
        )

    def _without_effect(self) -> list[str]:
        unused = []
        if self.config.advantage.credit == "terminal":
            unused.append("estimates: terminal credit scores final images only")
            unused.append("advantage.gae_lambda: terminal credit has no gains")
        if self.config.update.kl_coef == 0:
            unused.append("update.kl_form: update.kl_coef is 0")
        return unused


def _format_steps(steps: tuple[int, ...]) -> str:
    contiguous = len(steps) > 2 and steps == tuple(range(steps[0], steps[-1] + 1))
    return f"{steps[0]}..{steps[-1]}" if contiguous else ", ".join(map(str, steps))
