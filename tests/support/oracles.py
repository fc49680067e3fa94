"""Second derivations, in float64 numpy or in naive loops, of everything that the maths modules compute.

Gaussian data: x0 ~ N(mu, s^2) per element and x1 ~ N(0, 1), so that x_t = (1-t) x0 + t x1 is Gaussian, every
conditional expectation is linear in x_t, and the marginals of a sampler can be pushed forward without sampling.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GaussianData:
    """Data N(mean, std^2), of which everything is known."""

    mean: float
    std: float

    def marginal(self, t: float) -> tuple[float, float]:
        """Return mean and variance of x_t."""
        return (1 - t) * self.mean, (1 - t) ** 2 * self.std**2 + t**2

    def clean(self, x: Array, t: float) -> Array:
        """Return E[x0 | x_t = x], from the covariance of x0 and x_t."""
        mean, variance = self.marginal(t)
        return self.mean + (1 - t) * self.std**2 / variance * (x - mean)

    def noise(self, x: Array, t: float) -> Array:
        """Return E[x1 | x_t = x], from the covariance of x1 and x_t."""
        mean, variance = self.marginal(t)
        return t / variance * (x - mean)

    def velocity(self, x: Array, t: float) -> Array:
        """Return the ideal velocity E[x1 - x0 | x_t = x]."""
        return self.noise(x, t) - self.clean(x, t)

    def ode_end(self, x: Array, t: float) -> Array:
        """Return the image at which the exact ODE from x_t = x ends: it keeps the number of deviations."""
        mean, variance = self.marginal(t)
        return self.mean + self.std * (x - mean) / math.sqrt(variance)


def push_forward(
    data: GaussianData, step: Callable[[float, float, float], tuple[float, float]], sigmas: Sequence[float]
) -> tuple[float, float]:
    """Runs the exact marginal of sigmas[0] through a sampler; gives mean and variance at sigmas[-1].

    `step(x, t, p)` gives mean and std of the step from state x; for Gaussian data its mean is affine in x.
    """
    mean, variance = data.marginal(sigmas[0])
    for t, p in itertools.pairwise(sigmas):
        offset, std = step(0.0, t, p)
        slope = step(1.0, t, p)[0] - offset
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, variance


def flow_sde(x: Array, v: Array, t: float, p: float, sigma_max: float, noise_level: float) -> tuple[Array, float]:
    """Euler-Maruyama of the reverse SDE dx = [v - (s^2/2) score] dt + s dw, with score = -E[x1 | x_t] / t."""
    s_squared = noise_level**2 * t / (1 - (sigma_max if t == 1 else t))
    score = -(x + (1 - t) * v) / t
    return x + (v - s_squared / 2 * score) * (p - t), math.sqrt(s_squared * (t - p))


def ddim_sde(x: Array, v: Array, t: float, p: float, sigma_max: float, noise_level: float) -> tuple[Array, float]:
    """DDIM with noise: the clean estimate, then what of the noise is kept, from x = (1-t) x0_hat + t x1_hat."""
    std = noise_level * p * math.sqrt(1 - (sigma_max if t == 1 else t))
    return _ddim_mean(x, v, t, p, std), std


def cps(x: Array, v: Array, t: float, p: float, sigma_max: float, noise_level: float) -> tuple[Array, float]:
    """Coefficients-preserving sampling: a rotation of old noise into new by the angle noise_level pi/2."""
    angle = noise_level * math.pi / 2
    kept, fresh = p * math.cos(angle), p * math.sin(angle)
    x0_hat = x - t * v
    return (1 - p) * x0_hat + kept * (x - (1 - t) * x0_hat) / t, fresh


def ode(x: Array, v: Array, t: float, p: float, sigma_max: float, noise_level: float) -> tuple[Array, float]:
    """Euler step of dx = v dt."""
    return x + v * (p - t), 0.0


def _ddim_mean(x: Array, v: Array, t: float, p: float, std: float) -> Array:
    x0_hat = x - t * v
    x1_hat = (x - (1 - t) * x0_hat) / t
    return (1 - p) * x0_hat + math.sqrt(p**2 - std**2) * x1_hat


SAMPLERS = {"flow_sde": flow_sde, "ddim_sde": ddim_sde, "cps": cps, "ode": ode}


def advantages(
    rewards: Sequence[Sequence[float]], group_size: int, num_steps: int, credit: str, std: str, clip: float, eps: float
) -> list[list[float]]:
    """Group advantages, one number at a time."""
    if credit == "terminal":
        credits = [[float(row[-1])] * num_steps for row in rewards]
    else:
        credits = [[float(row[k + 1]) - float(row[k]) for k in range(num_steps)] for row in rewards]
    samples = range(len(credits))
    result = []
    for n in samples:
        group = [m for m in samples if m // group_size == n // group_size]
        members = list(samples) if std == "global" else group
        row = []
        for k in range(num_steps):
            all_steps = range(num_steps)
            mean_steps = [k] if credit in ("per_step", "step_mean") else all_steps
            std_steps = [k] if credit == "per_step" else all_steps
            mean = _mean([credits[m][j] for m in group for j in mean_steps])
            scale = _population_std([credits[m][j] for m in members for j in std_steps])
            row.append(max(-clip, min(clip, (credits[n][k] - mean) / (scale + eps))))
        result.append(row)
    return result


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _population_std(values: Sequence[float]) -> float:
    center = _mean(values)
    return math.sqrt(_mean([(value - center) ** 2 for value in values]))


def clipped_surrogate(
    log_prob: Sequence[float], old_log_prob: Sequence[float], advantage: Sequence[float], clip_range: float
) -> list[float]:
    """PPO's loss by its cases: an advantage is followed only as far as the clip range."""
    losses = []
    for new, old, gain in zip(log_prob, old_log_prob, advantage, strict=True):
        ratio = math.exp(new - old)
        bound = min(ratio, 1 + clip_range) if gain >= 0 else max(ratio, 1 - clip_range)
        losses.append(-bound * gain)
    return losses


def shifted_sigmas(num_steps: int, shift: float) -> Array:
    """Return num_steps + 1 noise levels from 1 to 0, moved towards noise by s -> shift s / (1 + (shift - 1) s).

    Source: FlowMatchEulerDiscreteScheduler of diffusers as StableDiffusion3Pipeline uses it; the shift is that of
    Esser et al., eq. 23, arXiv:2403.03206. It is applied twice, to the end of the grid and to the grid itself: the
    lowest sigma before the closing 0 is the twice shifted 1/1000.
    """
    lowest = _shifted(1 / 1000, shift)
    return np.append(_shifted(np.linspace(1, lowest, num_steps), shift), 0.0)


def _shifted(sigma: Array | float, shift: float) -> Array:
    return np.asarray(shift * sigma / (1 + (shift - 1) * sigma))
