"""Check that training changes the policy."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from sfgrpo.errors import SanityCheckError
from sfgrpo.grpo.distributed import any_of
from sfgrpo.grpo.update import Objective
from sfgrpo.policies.base import Policy
from sfgrpo.types import RolloutBatch


def require_changed_sampler(
    policy: Policy, batch: RolloutBatch, num_rows: int, objective: Objective, accelerator: Accelerator
) -> None:
    """Raise `SanityCheckError` on all processes if the policy's output on one of them is still that of the rollout.

    All processes call it together, after an update that trained. The first `num_rows` images must have been a batch of
    the rollout: batches of other sizes round differently, in float16 and bfloat16 by more than a first update changes.
    """
    rows = slice(0, num_rows)
    before = batch.trajectory.velocities_NKCHW[rows, 0]
    with torch.no_grad():
        after = policy.velocity(
            batch.trajectory.latents_NSCHW[rows, 0],
            objective.sigmas_S[0].expand(len(before)),
            batch.conditioning[rows],
            objective.sampling.guidance_scale,
        )
    unchanged = torch.allclose(before, after, rtol=0, atol=1e-6 * float(before.abs().max()))
    if any_of(unchanged, accelerator):
        raise SanityCheckError(
            "the sampler's output did not change with the first update: the adapter is not attached to the policy, or "
            "update.learning_rate is too small to matter"
        )
