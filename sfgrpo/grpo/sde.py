"""One denoising step as a Gaussian: its mean and std under each sampler, a draw, its log-prob, and a KL.

Signs and symbols: x_t = (1-t) x0 + t x1 with x0 the clean latent and x1 noise, velocity v = x1 - x0, t = sigma.
A step goes from t to p < t, and dt = t - p > 0. All maths is float32, whatever the dtype of the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sfgrpo.types import KlForm, SamplerName

Latents = Float[Tensor, "N C H W"]
PerSample = Float[Tensor, " N"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepDistribution:
    """The Gaussian from which the next state of each sample is drawn."""

    mean: Float32[Tensor, "N C H W"]
    std: Float32[Tensor, "N 1 1 1"]
    """Std of the step itself, which includes a factor sqrt(dt); 0 where the step is deterministic."""


Sampler = Callable[[Latents, Latents, PerSample, PerSample, float, float], StepDistribution]
"""A rule that turns (x, velocity, sigma, sigma_next, sigma_max, noise_level) into the distribution of the next state.

Every rule is the Euler step of the ODE at noise level 0. `sigma_max` is the second sigma of the schedule and replaces
sigma in 1 - sigma where sigma is 1. Samples of one batch may be at different sigmas.
"""


def flow_sde(
    x: Latents, velocity: Latents, sigma: PerSample, sigma_next: PerSample, sigma_max: float, noise_level: float
) -> StepDistribution:
    """Step by x(1 - s^2 dt/2t) - v(1 + s^2 (1-t)/2t) dt with std s sqrt(dt), s = noise_level sqrt(t/(1-t)).

    Source: Flow-GRPO, arXiv:2505.05470. Euler-Maruyama of an SDE with the marginals of the ODE, of order 1.
    """
    x, v, t, p = _float32(x, velocity, sigma, sigma_next)
    dt = t - p
    s = noise_level * (t / (1 - _below_one(t, sigma_max))).sqrt()
    mean = x * (1 - s**2 * dt / (2 * t)) - v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    return StepDistribution(mean=mean, std=s * dt.sqrt())


def ddim_sde(
    x: Latents, velocity: Latents, sigma: PerSample, sigma_next: PerSample, sigma_max: float, noise_level: float
) -> StepDistribution:
    """Step to (1-p) x0_hat + sqrt(p^2 - std^2) x1_hat with std noise_level p sqrt(1-t).

    Source: Stepwise-Flow-GRPO, arXiv:2603.28718. The std does not shrink with dt, so the marginals of the ODE are
    kept only as far as x0_hat is certain; where it is not, some variance is lost at every step however short.
    Differs: at t = 1 the printed std is 0; sigma_max is used there, as in `flow_sde`.

    Raises:
        ValueError: the std exceeds p, which a noise level of at most 1 rules out.
    """
    x, v, t, p = _float32(x, velocity, sigma, sigma_next)
    std = noise_level * p * (1 - _below_one(t, sigma_max)).sqrt()
    if bool((std > p).any()):
        raise ValueError(
            f"noise_level {noise_level} gives ddim_sde a step std above the noise that is left, so that "
            f"sqrt(p^2 - std^2) does not exist; use a noise_level of at most 1"
        )
    return StepDistribution(mean=_ddim_mean(x, v, t, p, std), std=std)


def cps(
    x: Latents, velocity: Latents, sigma: PerSample, sigma_next: PerSample, sigma_max: float, noise_level: float
) -> StepDistribution:
    """Step to (1-p) x0_hat + sqrt(p^2 - std^2) x1_hat with std p sin(noise_level pi/2).

    Source: Flow-CPS, coefficients-preserving sampling, arXiv:2509.05952. Marginals are kept as in `ddim_sde`.

    Raises:
        ValueError: the noise level is above 1, where the sine would fall again.
    """
    del sigma_max
    if noise_level > 1:
        raise ValueError(f"noise_level {noise_level} is above 1, where cps replaces all noise; use 0 to 1")
    x, v, t, p = _float32(x, velocity, sigma, sigma_next)
    std = p * math.sin(noise_level * math.pi / 2)
    return StepDistribution(mean=_ddim_mean(x, v, t, p, std), std=std)


def ode(
    x: Latents, velocity: Latents, sigma: PerSample, sigma_next: PerSample, sigma_max: float, noise_level: float
) -> StepDistribution:
    """Step to x - v dt, the Euler step of the probability-flow ODE, with std 0 at every noise level."""
    del sigma_max, noise_level
    x, v, t, p = _float32(x, velocity, sigma, sigma_next)
    return StepDistribution(mean=x - v * (t - p), std=torch.zeros_like(t))


SAMPLERS: dict[SamplerName, Sampler] = {"flow_sde": flow_sde, "ddim_sde": ddim_sde, "cps": cps, "ode": ode}


def sample_step(distribution: StepDistribution, noise: Latents) -> Float32[Tensor, "N C H W"]:
    """Return the next state, mean + std noise, for given standard normal noise."""
    return distribution.mean + distribution.std * noise.float()


def gaussian_log_prob(x: Latents, mean: Latents, std: Float[Tensor, "N 1 1 1"]) -> Float32[Tensor, " N"]:
    """Return log N(x; mean, std^2), the full density, averaged over the elements of a sample.

    Differs: a log-prob sums over the elements. Flow-GRPO's clip ranges (1e-4 and below) presume this mean.

    Raises:
        ValueError: std is 0: a deterministic step has no density.
    """
    _check_density(std)
    x, mean, std = x.float(), mean.float(), std.float()
    log_density = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return log_density.mean(dim=(1, 2, 3))


def gaussian_kl(
    mean: Latents, mean_ref: Latents, std: Float[Tensor, "N 1 1 1"], form: KlForm, dt: PerSample
) -> Float32[Tensor, " N"]:
    """Return KL(N(mean, std^2) || N(mean_ref, std^2)) = |mean - mean_ref|^2 / (2 std^2), averaged over the elements.

    `exact` is this closed form. `flow_grpo` is what Flow-GRPO's code computes: it leaves dt out of the variance,
    dividing by 2 std^2 / dt, which makes it dt times the exact value. The published coefficients (0.04 for GenEval and
    OCR, 0.01 for PickScore) belong to `flow_grpo`; under `exact` they would weigh 1/dt times as much.

    Raises:
        ValueError: std is 0.
    """
    _check_density(std)
    variance = std.float() ** 2
    if form == "flow_grpo":
        variance = variance / _column(dt)
    return ((mean.float() - mean_ref.float()) ** 2 / (2 * variance)).mean(dim=(1, 2, 3))


def stochastic_steps(sampler_name: SamplerName, sigmas: Float[Tensor, " S"], noise_level: float) -> list[bool]:
    """Return whether each of the S - 1 steps of a schedule has a density, that is a std above 0."""
    nothing = sigmas.new_zeros(len(sigmas) - 1, 1, 1, 1)
    step = SAMPLERS[sampler_name](nothing, nothing, sigmas[:-1], sigmas[1:], sigmas[1].item(), noise_level)
    stochastic: list[bool] = (step.std.flatten() > 0).tolist()
    return stochastic


def trainable_steps(
    sampler_name: SamplerName, sigmas: Float[Tensor, " S"], noise_level: float, requested: Sequence[int] | None = None
) -> list[int]:
    """Return the steps that the objective covers, in order: the requested ones, or all that can be trained.

    A step can be trained if it is stochastic and not the last one, which Flow-GRPO leaves out too.

    Raises:
        ValueError: no step can be trained, or a requested one cannot.
    """
    stochastic = stochastic_steps(sampler_name, sigmas, noise_level)
    allowed = [step for step, has_density in enumerate(stochastic[:-1]) if has_density]
    chosen = allowed if requested is None else sorted(set(requested))
    refused = sorted(set(chosen) - set(allowed))
    if refused:
        raise ValueError(
            f"steps {refused} cannot be trained: they are the last one, deterministic or not in the schedule; "
            f"allowed under {sampler_name} at noise_level {noise_level} are {allowed}"
        )
    if not chosen:
        raise ValueError(
            f"no step is left to train under {sampler_name} at noise_level {noise_level} with {len(stochastic)} steps; "
            f"allowed are {allowed}: raise noise_level or num_steps, take a stochastic sampler, or name some steps"
        )
    return chosen


def _ddim_mean(x: Tensor, v: Tensor, t: Tensor, p: Tensor, std: Tensor) -> Tensor:
    x0_hat = x - t * v
    x1_hat = x + (1 - t) * v
    return (1 - p) * x0_hat + (p**2 - std**2).sqrt() * x1_hat


def _below_one(t: Tensor, sigma_max: float) -> Tensor:
    return torch.where(t < 1, t, sigma_max)


def _check_density(std: Tensor) -> None:
    if not bool((std > 0).all()):
        deterministic = (~(std.flatten() > 0)).nonzero().flatten().tolist()
        raise ValueError(
            f"samples {deterministic} took a step whose std is not above 0, which has no density; leave such steps out "
            f"(see trainable_steps), or raise noise_level"
        )


def _float32(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.float(), velocity.float(), _column(sigma), _column(sigma_next)


def _column(values: Tensor) -> Tensor:
    """Reshape one number per sample so that it broadcasts over C H W."""
    return values.float().view(-1, 1, 1, 1)
