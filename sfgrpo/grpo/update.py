"""The policy update: log-probs of the rollout computed anew, clipped surrogate, backward passes, optimiser steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.config.schema import SamplingConfig, UpdateConfig
from sfgrpo.errors import SanityCheckError
from sfgrpo.grpo.distributed import even_slices, gathered, total, total_gradients
from sfgrpo.grpo.losses import clipped_surrogate
from sfgrpo.grpo.sde import SAMPLERS, StepDistribution, gaussian_kl, gaussian_log_prob, trainable_steps
from sfgrpo.policies.base import Policy
from sfgrpo.types import RolloutBatch

COLUMNS = ("loss", "ratio", "deviation", "clipped", "approx_kl", "kl_reference")
"""Numbers kept of every trained (image, step)."""
LOWEST_SCALE = 1.0
"""Lower loss scales only lose digits: a gradient that overflows even here is broken."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an update maximises: everything that is not in the rollout."""

    sampling: SamplingConfig
    update: UpdateConfig
    sigmas_S: Tensor
    trained_steps: Sequence[int]
    micro_batch_size: int
    """Images per forward and backward pass: `update.micro_batch_size`, or fewer if this process has fewer."""

    @classmethod
    def of(cls, policy: Policy, sampling: SamplingConfig, update: UpdateConfig, micro_batch_size: int) -> Objective:
        """Add the policy's schedule to the parameters, and the steps that can be trained under it.

        Raises:
            ValueError: no step can be trained, or one of `update.trained_steps` cannot.
        """
        sigmas_S = policy.sigmas(sampling.num_steps).to(policy.device)
        return cls(
            sampling=sampling,
            update=update,
            sigmas_S=sigmas_S,
            trained_steps=trainable_steps(sampling.sampler, sigmas_S, sampling.noise_level, update.trained_steps),
            micro_batch_size=micro_batch_size,
        )

    def step_distribution(self, x: Tensor, velocity: Tensor, step: int) -> StepDistribution:
        """Return the distribution of state `step + 1` given states x [N, C, H, W] at `step` and their velocities."""
        sigma, sigma_next = (self.sigmas_S[state].expand(len(x)) for state in (step, step + 1))
        rule = SAMPLERS[self.sampling.sampler]
        return rule(x, velocity, sigma, sigma_next, float(self.sigmas_S[1]), self.sampling.noise_level)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOutcome:
    """Result of an update; metrics and `trained` cover all processes and are the same on each."""

    metrics: dict[str, float]
    """Always finite: means and sums are over what is finite."""
    trained: bool
    """Whether some advantage was not 0, and no optimiser step was skipped."""
    broken_loss_N: Tensor
    """True for the images of this process whose loss, or log-prob, is NaN or infinite; on the CPU."""
    broken_gradient_N: Tensor
    """True for the images of this process behind such a gradient, although every loss is finite; on the CPU."""


def make_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler of a policy in float16; for any other dtype it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
    on_pass: Callable[[], None] = lambda: None,
) -> UpdateOutcome:
    """Take `steps_per_update` optimiser steps, each on its own consecutive share of the rollout's images.

    The batch holds the images of this process; optimiser step s learns from share s of all processes together. The
    loss is the mean over all images and trained steps of a share; images of constant groups count as zeros and cost
    nothing. The first step is on-policy, so its ratio must be 1. `on_pass` follows every backward pass, equally often
    in all processes; if it raises, the policy may be anywhere within the update.

    All processes skip a step if its loss or gradient is not finite on any of them. A gradient that overflows at a
    scale of `scaler` that can still fall is skipped too, but not counted as broken.

    Gradients are added up once a step, by `total_gradients`, and not by the hooks of DDP: since constant groups cost
    nothing, processes differ in their number of images, and so would in their number of backward passes.

    Raises:
        SanityCheckError: the ratio of the first step is off 1 by more than `ratio_tolerance` on some process (raised on
            all of them); or no trainable parameter takes part in the loss.
    """
    constant_N = batch.constant_N.cpu()
    broken_loss_N, broken_gradient_N = torch.zeros(2, len(constant_N), dtype=torch.bool).unbind()
    passes: list[_Passes] = []
    steps: list[_Step] = []
    for share in torch.arange(len(constant_N)).chunk(objective.update.steps_per_update):
        rows = share[~constant_N[share]]
        num_terms = len(share) * len(objective.trained_steps) * accelerator.num_processes
        done = _accumulate_gradients(policy, batch, rows, num_terms, objective, accelerator, scaler, on_pass)
        if not passes:
            _check_first_ratio(done.deviations, objective.update.ratio_tolerance)
        passes.append(done)
        if done.sums["broken"]:
            broken_loss_N[done.broken_rows] = True
        elif done.num_passes:
            steps.append(_take_step(policy, optimizer, objective.update.max_grad_norm, accelerator, scaler))
            broken_gradient_N[rows] = steps[-1].kind == "broken"
        optimizer.zero_grad()
    undisturbed = all(step.kind == "finite" for step in steps) and not any(done.sums["broken"] for done in passes)
    return UpdateOutcome(
        metrics=_metrics(passes, steps, scaler),
        trained=undisturbed and any(done.sums["with_advantage"] for done in passes),
        broken_loss_N=broken_loss_N,
        broken_gradient_N=broken_gradient_N,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """Result of the forward and backward passes of a share."""

    num_passes: int
    sums: Mapping[str, float]
    """Sums of `COLUMNS` over the finite (image, step) terms of all processes, and the numbers of terms of each kind."""
    deviations: list[float]
    """Largest |ratio - 1| of each process."""
    broken_rows: Tensor
    """Images of this process with a term that is not finite."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Outcome of an optimiser step."""

    kind: Literal["finite", "overflow", "broken"]
    grad_norm: float


def _accumulate_gradients(
    policy: Policy,
    batch: RolloutBatch,
    rows: Tensor,
    num_terms: int,
    objective: Objective,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
    on_pass: Callable[[], None],
) -> _Passes:
    """Add the gradient of a share's loss to the parameters, one micro-batch of one step at a time."""
    parts = [rows[part] for part in even_slices(len(rows), objective.micro_batch_size, accelerator)]
    collected = [torch.empty(0, len(COLUMNS), device=policy.device)]
    for step in objective.trained_steps:
        for part in parts:
            if len(part):
                loss, columns = _step_loss(policy, batch, part.to(policy.device), step, objective)
                collected.append(columns)
            else:
                loss = _loss_of_nothing(policy, batch, step, objective)
            if not loss.requires_grad:
                raise SanityCheckError("no trainable parameter takes part in the loss: the adapter is not attached")
            # Not by accelerator.backward, which would scale a second time if it was launched with mixed precision.
            scaler.scale(loss / num_terms).backward()
            on_pass()
    columns_MJ = torch.cat(collected).cpu().double()
    finite_M = columns_MJ.isfinite().all(dim=1)
    finite_MJ = columns_MJ[finite_M]
    advantages = batch.advantages_NK.cpu()[rows][:, list(objective.trained_steps)]
    counts = {
        "all": float(num_terms / accelerator.num_processes),
        "finite": float(finite_M.sum()),
        "broken": float((~finite_M).sum()),
        "with_advantage": float(advantages.count_nonzero()),
    }
    local = counts | dict(zip(COLUMNS, finite_MJ.sum(dim=0).tolist(), strict=True))
    deviation = finite_MJ[:, COLUMNS.index("deviation")]
    return _Passes(
        num_passes=len(parts) * len(objective.trained_steps),
        sums=dict(zip(local, total(list(local.values()), accelerator), strict=True)),
        deviations=gathered(torch.cat([deviation, torch.zeros(1)]).amax().float().view(1), accelerator).tolist(),
        broken_rows=rows.repeat(len(objective.trained_steps))[~finite_M],
    )


def _metrics(passes: Sequence[_Passes], steps: Sequence[_Step], scaler: torch.amp.GradScaler) -> dict[str, float]:
    """Summarise all shares: the loss is a mean over all images, everything else over the trained ones."""
    sums = {name: sum(done.sums[name] for done in passes) for name in passes[0].sums}
    finite, counted = sums["finite"], sums["all"] - sums["broken"]
    num_broken = sum(bool(done.sums["broken"]) for done in passes) + sum(step.kind == "broken" for step in steps)
    num_overflows = sum(step.kind == "overflow" for step in steps)
    # A share without images to learn from is a step with a gradient of 0.
    num_norms = len(passes) - num_broken - num_overflows
    metrics = {
        "policy/loss": sums["loss"] / counted if counted else 0.0,
        "policy/ratio_mean": sums["ratio"] / finite if finite else 1.0,
        "policy/clip_fraction": sums["clipped"] / finite if finite else 0.0,
        "policy/approx_kl": sums["approx_kl"] / finite if finite else 0.0,
        "policy/kl_reference": sums["kl_reference"] / finite if finite else 0.0,
        "policy/ratio_deviation": max(max(done.deviations) for done in passes),
        "policy/ratio_deviation_first_pass": max(passes[0].deviations),
        "optim/grad_norm": sum(step.grad_norm for step in steps if step.kind == "finite") / max(num_norms, 1),
        "guards/skipped_steps": float(num_broken),
    }
    if scaler.is_enabled():
        metrics |= {"optim/overflow_steps": float(num_overflows), "optim/loss_scale": scaler.get_scale()}
    return metrics


def _take_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
) -> _Step:
    """Take one optimiser step with the gradients of all processes, unless they are all 0 or one is not finite."""
    parameters = list(policy.adapter_parameters().values())
    total_gradients(parameters, accelerator)
    scaler.unscale_(optimizer)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    # With a gradient of 0 AdamW would still move the weights, by its momentum and weight decay.
    if math.isfinite(grad_norm) and grad_norm > 0:
        scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    if math.isfinite(grad_norm):
        return _Step(kind="finite", grad_norm=grad_norm)
    if LOWEST_SCALE <= scaler.get_scale() < scale:
        return _Step(kind="overflow", grad_norm=grad_norm)
    if scaler.is_enabled():
        scaler.update(max(scaler.get_scale(), LOWEST_SCALE))
    return _Step(kind="broken", grad_norm=grad_norm)


def _step_loss(
    policy: Policy, batch: RolloutBatch, rows: Tensor, step: int, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of one step of the images `rows`, and its `COLUMNS` [len(rows), J] without gradient.

    The KL to the start policy is computed only if it has a weight, and 0 otherwise.
    """
    latents = batch.trajectory.latents_NSCHW
    x, taken = latents[rows, step], latents[rows, step + 1]
    inputs = (x, objective.sigmas_S[step].expand(len(x)), batch.conditioning[rows], objective.sampling.guidance_scale)
    now = objective.step_distribution(x, policy.velocity(*inputs), step)
    surrogate = clipped_surrogate(
        gaussian_log_prob(taken, now.mean, now.std),
        batch.trajectory.log_probs_NK[rows, step],
        batch.advantages_NK[rows, step],
        objective.update.clip_range,
    )
    kl = torch.zeros_like(surrogate.ratio)
    if objective.update.kl_coef > 0:
        start = objective.step_distribution(x, policy.reference_velocity(*inputs), step)
        dt = (objective.sigmas_S[step] - objective.sigmas_S[step + 1]).expand(len(x))
        kl = gaussian_kl(now.mean, start.mean, now.std, objective.update.kl_form, dt)
    columns = (surrogate.loss, surrogate.ratio, surrogate.deviation, surrogate.clipped, surrogate.approx_kl, kl)
    return (surrogate.loss + objective.update.kl_coef * kl).sum(), torch.stack(columns, dim=1).detach()


def _loss_of_nothing(policy: Policy, batch: RolloutBatch, step: int, objective: Objective) -> Tensor:
    """Return a loss of 0 by the passes that an image would take, since a sharded model needs every process in each.

    They are those of one blank latent: not every attention kernel takes a batch of 0.
    """
    blank = torch.zeros_like(batch.trajectory.latents_NSCHW[:1, step])
    inputs = (blank, objective.sigmas_S[step].expand(1), batch.conditioning[:1], objective.sampling.guidance_scale)
    if objective.update.kl_coef > 0:
        policy.reference_velocity(*inputs)
    return 0 * policy.velocity(*inputs).sum()


def _check_first_ratio(deviations: Sequence[float], tolerance: float) -> None:
    """Check the largest |ratio - 1| of every process, so that all of them fail together."""
    if off := [rank for rank, deviation in enumerate(deviations) if deviation > tolerance]:
        where = f" on rank {', '.join(map(str, off))} of {len(deviations)}" if len(deviations) > 1 else ""
        raise SanityCheckError(
            f"before the first optimiser step the ratio is off 1 by {max(deviations):.3g}{where}, more than "
            f"update.ratio_tolerance {tolerance:.3g}: rollout and update disagree on dtype, batch, schedule or adapter"
        )
