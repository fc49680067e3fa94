"""One update of the policy: recompute the log-probs of a rollout, clipped surrogate, backward, optimiser steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.errors import CanaryError
from sfgrpo.losses import PolicyLoss, clipped_surrogate
from sfgrpo.policies.base import Policy
from sfgrpo.rollout import row_slices
from sfgrpo.sde import SAMPLERS, StepDistribution, gaussian_kl, gaussian_log_prob
from sfgrpo.types import RolloutBatch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an update maximises: everything about it that is not in the rollout."""

    sigmas_S: Tensor
    sampler: str
    noise_level: float
    guidance_scale: float
    trained_steps: tuple[int, ...]
    clip_range: float
    kl_coef: float
    kl_form: Literal["exact", "flow_grpo"]
    max_grad_norm: float
    steps_per_update: int
    micro_batch_size: int
    ratio_tolerance: float


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Takes `steps_per_update` optimiser steps, each on its own consecutive share of the rollout's images.

    The loss is the mean over all images and trained steps of a share, on all processes; images of constant groups
    count as the zeros that they are and cost nothing. The first step is on-policy, so its ratio must be 1.

    Raises:
        CanaryError: the ratio of the first step is off 1 by more than `ratio_tolerance`; no trainable parameter takes
            part in the loss; or the gradient is not finite.
    """
    shares = torch.arange(len(batch.constant_N), device=batch.constant_N.device).chunk(objective.steps_per_update)
    collected: list[Mapping[str, float]] = []
    for index, rows in enumerate(shares):
        metrics = _accumulate_gradients(policy, batch, rows[~batch.constant_N[rows]], len(rows), objective, accelerator)
        if index == 0:
            _check_first_ratio(metrics["policy/ratio_deviation"], objective.ratio_tolerance)
        parameters = list(policy.adapter_parameters().values())
        for parameter in parameters:
            parameter.grad = accelerator.reduce(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, reduction="sum"
            )
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, objective.max_grad_norm)
        if not grad_norm.isfinite():
            raise CanaryError(f"the norm of the gradient is {float(grad_norm)}: lower update.learning_rate")
        if grad_norm > 0:
            optimizer.step()
        optimizer.zero_grad()
        collected.append({**metrics, "optim/grad_norm": float(grad_norm)})
    averaged = {key: sum(metrics[key] for metrics in collected) / len(collected) for key in collected[0]}
    return {**averaged, "policy/ratio_deviation_first_pass": collected[0]["policy/ratio_deviation"]}


def _accumulate_gradients(
    policy: Policy,
    batch: RolloutBatch,
    rows: Tensor,
    share_size: int,
    objective: Objective,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Adds the gradient of a share's loss into the parameters, one micro-batch of one step at a time."""
    num_terms = share_size * len(objective.trained_steps) * accelerator.num_processes
    losses: list[PolicyLoss] = []
    kls: list[Tensor] = []
    for step in objective.trained_steps:
        for part in row_slices(len(rows), objective.micro_batch_size):
            surrogate, kl = _step_loss(policy, batch, rows[part], step, objective)
            if not surrogate.loss.requires_grad:
                raise CanaryError("no trainable parameter takes part in the loss: the adapter is not attached")
            accelerator.backward((surrogate.loss + objective.kl_coef * kl).sum() / num_terms)
            losses.append(surrogate)
            kls.append(kl.detach())
    return {
        "policy/loss": float(sum(loss.loss.detach().sum() for loss in losses)) / num_terms,
        "policy/ratio_mean": _mean([loss.ratio_mean for loss in losses], empty=1.0),
        "policy/ratio_deviation": max([float(loss.ratio_deviation) for loss in losses], default=0.0),
        "policy/clip_fraction": _mean([loss.clip_fraction for loss in losses]),
        "policy/approx_kl": _mean([loss.approx_kl for loss in losses]),
        "policy/kl_reference": float(torch.cat(kls).mean()) if kls else 0.0,
    }


def _mean(values: Sequence[Tensor], empty: float = 0.0) -> float:
    return float(torch.stack(list(values)).mean()) if values else empty


def _step_loss(
    policy: Policy, batch: RolloutBatch, rows: Tensor, step: int, objective: Objective
) -> tuple[PolicyLoss, Tensor]:
    """Gives the surrogate of one step of the images `rows`, and the KL to the start policy (0 where its weight is)."""
    latents = batch.trajectory.latents_NSCHW
    x, taken = latents[rows, step], latents[rows, step + 1]
    conditioning = batch.conditioning[rows]
    sigma, sigma_next = (objective.sigmas_S[state].expand(len(rows)) for state in (step, step + 1))

    def distribution(velocity: Tensor) -> StepDistribution:
        sigma_max = float(objective.sigmas_S[1])
        return SAMPLERS[objective.sampler](x, velocity, sigma, sigma_next, sigma_max, objective.noise_level)

    now = distribution(policy.velocity(x, sigma, conditioning, objective.guidance_scale))
    surrogate = clipped_surrogate(
        gaussian_log_prob(taken, now.mean, now.std),
        batch.trajectory.log_probs_NK[rows, step],
        batch.advantages_NK[rows, step],
        objective.clip_range,
    )
    if objective.kl_coef == 0:
        return surrogate, torch.zeros(len(rows), device=x.device)
    start = distribution(policy.reference_velocity(x, sigma, conditioning, objective.guidance_scale))
    return surrogate, gaussian_kl(now.mean, start.mean, now.std, objective.kl_form, sigma - sigma_next)


def _check_first_ratio(deviation: float, tolerance: float) -> None:
    # Written so that NaN fails too.
    if not deviation <= tolerance:
        raise CanaryError(
            f"before the first optimiser step the ratio is off 1 by {deviation:.3g}, more than update.ratio_tolerance "
            f"{tolerance:.3g}: rollout and update disagree on dtype, batch, schedule or adapter"
        )


def require_changed_sampler(policy: Policy, batch: RolloutBatch, objective: Objective) -> None:
    """Raises `CanaryError` when the policy's output is bit for bit what it was in the rollout: nothing was trained."""
    row = slice(0, 1)
    before = batch.trajectory.velocities_NKCHW[row, 0]
    with torch.no_grad():
        after = policy.velocity(
            batch.trajectory.latents_NSCHW[row, 0],
            objective.sigmas_S[:1],
            batch.conditioning[row],
            objective.guidance_scale,
        )
    # A batch of one may round differently from the rollout's, by far less than an optimiser step moves the output.
    if torch.allclose(before, after, rtol=0, atol=1e-6 * float(before.abs().max())):
        raise CanaryError(
            "the sampler's output did not change with the first update: the adapter is not attached to the policy, or "
            "update.learning_rate is too small to matter"
        )
