"""Samplers agree with a second derivation, keep the marginals as far as they claim, and have the densities they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfgrpo.grpo.sde import (
    SAMPLERS,
    StepDistribution,
    gaussian_kl,
    gaussian_log_prob,
    sample_step,
    stochastic_steps,
    trainable_steps,
)
from tests.support import oracles
from tests.support.oracles import GaussianData

SHAPE = (6, 3, 4, 5)
SIGMA = torch.tensor([1.0, 0.96, 0.8, 0.5, 0.2, 0.01])
SIGMA_NEXT = torch.tensor([0.96, 0.8, 0.5, 0.2, 0.01, 0.0])
SIGMA_MAX = 0.96
NOISY = ("flow_sde", "ddim_sde", "cps")
EVERY = list(range(10))


def shifted_sigmas(num_steps: int) -> Tensor:
    return torch.from_numpy(oracles.shifted_sigmas(num_steps, shift=3.0)).float()


def full(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def gaussian_step(name: str, data: GaussianData, noise_level: float, x: float, t: float, p: float):
    """Take one step of the library's sampler under the ideal velocity of Gaussian data."""
    velocity = float(data.velocity(x, t))
    step = SAMPLERS[name](full(x), full(velocity), torch.tensor([t]), torch.tensor([p]), 0.99, noise_level)
    return step.mean.item(), step.std.item()


def variance_error(name: str, data: GaussianData, noise_level: float, num_steps: int) -> float:
    sigmas = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64).tolist()
    mean, variance = oracles.push_forward(data, lambda x, t, p: gaussian_step(name, data, noise_level, x, t, p), sigmas)
    expected_mean, expected_variance = data.marginal(sigmas[-1])
    assert mean == pytest.approx(expected_mean, abs=1e-4)
    return variance - expected_variance


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_equals_second_derivation(name: str, noise_level: float) -> None:
    x, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    step = SAMPLERS[name](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, noise_level)
    for n, (t, p) in enumerate(zip(SIGMA.double().tolist(), SIGMA_NEXT.double().tolist(), strict=True)):
        sigma_max = float(torch.tensor(SIGMA_MAX))
        arrays = x[n].double().numpy(), velocity[n].double().numpy()
        mean, std = oracles.SAMPLERS[name](*arrays, t, p, sigma_max, noise_level)
        torch.testing.assert_close(step.mean[n].double(), torch.as_tensor(mean), rtol=1e-4, atol=1e-5)
        assert step.std[n].item() == pytest.approx(std, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", NOISY)
def test_sampler_without_noise_is_the_ode(name: str) -> None:
    x, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    step = SAMPLERS[name](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.0)
    euler = SAMPLERS["ode"](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7)
    torch.testing.assert_close(step.mean, euler.mean)
    torch.testing.assert_close(step.std, torch.zeros(6, 1, 1, 1))
    torch.testing.assert_close(euler.std, torch.zeros(6, 1, 1, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_may_mix_time_steps(name: str) -> None:
    x, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    batch = SAMPLERS[name](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7)
    for n in range(6):
        row = slice(n, n + 1)
        alone = SAMPLERS[name](x[row], velocity[row], SIGMA[row], SIGMA_NEXT[row], SIGMA_MAX, 0.7)
        torch.testing.assert_close(batch.mean[row], alone.mean, rtol=0, atol=0)
        torch.testing.assert_close(batch.std[row], alone.std, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_computes_in_float32_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    x, velocity = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    step = SAMPLERS[name](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7)
    same = SAMPLERS[name](x.float(), velocity.float(), SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7)
    assert step.mean.dtype == step.std.dtype == torch.float32
    torch.testing.assert_close(step.mean, same.mean, rtol=0, atol=0)


def test_flow_sde_keeps_the_marginals_to_first_order() -> None:
    data = GaussianData(mean=0.7, std=0.6)
    ratio = variance_error("flow_sde", data, 0.7, 80) / variance_error("flow_sde", data, 0.7, 160)
    assert 1.6 < ratio < 2.4


@pytest.mark.parametrize("name", ["ddim_sde", "cps"])
def test_ddim_means_keep_the_marginals_to_first_order_when_noise_scales_with_the_step(name: str) -> None:
    # Their std does not contain sqrt(dt); only with it in the noise level is there an SDE to converge to.
    data = GaussianData(mean=0.7, std=0.6)
    coarse = variance_error(name, data, 0.7 * math.sqrt(0.9 / 80), 80)
    fine = variance_error(name, data, 0.7 * math.sqrt(0.9 / 160), 160)
    assert 1.6 < coarse / fine < 2.4


@pytest.mark.parametrize("name", ["ddim_sde", "cps"])
def test_ddim_means_lose_variance_at_a_fixed_noise_level_however_short_the_steps(name: str) -> None:
    data = GaussianData(mean=0.7, std=0.6)
    coarse, fine = variance_error(name, data, 0.7, 160), variance_error(name, data, 0.7, 320)
    assert fine < -0.03
    assert coarse / fine < 1.1


@pytest.mark.parametrize("name", ["ddim_sde", "cps"])
def test_ddim_means_keep_the_marginals_exactly_when_the_image_is_certain(name: str) -> None:
    assert variance_error(name, GaussianData(mean=0.7, std=0.0), 0.7, 7) == pytest.approx(0, abs=1e-6)


def test_ddim_sde_refuses_more_noise_than_is_left() -> None:
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"noise_level 1\.2 .* use a noise_level of at most 1"):
        SAMPLERS["ddim_sde"](x, x, SIGMA, SIGMA_NEXT, SIGMA_MAX, 1.2)


def test_cps_refuses_a_noise_level_above_one() -> None:
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"noise_level 1\.2 is above 1"):
        SAMPLERS["cps"](x, x, SIGMA, SIGMA_NEXT, SIGMA_MAX, 1.2)


def test_given_noise_makes_the_step_exact() -> None:
    mean, std, noise = torch.randn(SHAPE), torch.rand(6, 1, 1, 1), torch.randn(SHAPE)
    x = sample_step(StepDistribution(mean=mean, std=std), noise.double())
    torch.testing.assert_close((x - mean) / std, noise, rtol=1e-3, atol=1e-4)


def test_log_prob_is_the_mean_over_elements_of_the_full_density() -> None:
    x, mean, std = torch.randn(SHAPE), torch.randn(SHAPE), 0.1 + torch.rand(6, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(x.double(), mean, std), expected)


def test_log_prob_of_a_deterministic_step_is_refused() -> None:
    x, std = torch.randn(SHAPE), torch.ones(6, 1, 1, 1)
    std[2] = 0
    with pytest.raises(ValueError, match=r"samples \[2\] took a step whose std is not above 0"):
        gaussian_log_prob(x, x, std)


def test_exact_kl_is_that_of_two_gaussians() -> None:
    mean, mean_ref, std = torch.randn(SHAPE), torch.randn(SHAPE), 0.1 + torch.rand(6, 1, 1, 1)
    normals = torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std)
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std, "exact", SIGMA - SIGMA_NEXT), expected)


def test_exact_kl_is_the_expected_log_ratio_of_drawn_steps() -> None:
    mean, std = torch.full((1, 1, 400, 500), 0.3), full(0.8)
    x = sample_step(StepDistribution(mean=mean, std=std), torch.randn_like(mean))
    drawn = gaussian_log_prob(x, mean, std) - gaussian_log_prob(x, mean - 0.5, std)
    exact = gaussian_kl(mean, mean - 0.5, std, "exact", torch.ones(1))
    torch.testing.assert_close(exact, drawn, rtol=0.02, atol=0)


def test_flow_grpo_kl_divides_by_the_noise_scale_without_dt() -> None:
    x, velocity, velocity_ref = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    step = SAMPLERS["flow_sde"](x, velocity, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7)
    mean_ref = SAMPLERS["flow_sde"](x, velocity_ref, SIGMA, SIGMA_NEXT, SIGMA_MAX, 0.7).mean
    std_dev = 0.7 * torch.sqrt(SIGMA / (1 - torch.where(SIGMA == 1, SIGMA_MAX, SIGMA)))
    expected = ((step.mean - mean_ref) ** 2).flatten(1).mean(1) / (2 * std_dev**2)
    torch.testing.assert_close(gaussian_kl(step.mean, mean_ref, step.std, "flow_grpo", SIGMA - SIGMA_NEXT), expected)


def test_kl_of_a_deterministic_step_is_refused() -> None:
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="which has no density"):
        gaussian_kl(x, x, torch.zeros(6, 1, 1, 1), "exact", SIGMA - SIGMA_NEXT)


@pytest.mark.parametrize(
    ("name", "noise_level", "deterministic"),
    [
        ("flow_sde", 0.7, []),
        ("ddim_sde", 0.7, [9]),
        ("cps", 0.7, [9]),
        ("cps", 0.0, EVERY),
        ("ode", 0.7, EVERY),
    ],
)
def test_stochastic_steps_are_those_with_a_density(name: str, noise_level: float, deterministic: list[int]) -> None:
    stochastic = stochastic_steps(name, shifted_sigmas(10), noise_level)
    assert [step for step, has_density in enumerate(stochastic) if not has_density] == deterministic


@pytest.mark.parametrize("name", NOISY)
def test_all_steps_but_the_last_are_trained_by_default(name: str) -> None:
    assert trainable_steps(name, shifted_sigmas(10), 0.7) == list(range(9))


def test_requested_steps_are_trained_once_and_in_order() -> None:
    assert trainable_steps("flow_sde", shifted_sigmas(10), 0.7, [4, 0, 4]) == [0, 4]


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("step", [9, 10, -1])
def test_last_step_is_refused(name: str, step: int) -> None:
    with pytest.raises(ValueError, match=rf"steps \[{step}\] cannot be trained: .* are \[0, 1, 2, 3, 4, 5, 6, 7, 8\]"):
        trainable_steps(name, shifted_sigmas(10), 0.7, [0, step])


def test_deterministic_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps \[0\] cannot be trained: .* allowed under ode .* are \[\]"):
        trainable_steps("ode", shifted_sigmas(10), 0.7, [0])


@pytest.mark.parametrize(("name", "noise_level", "num_steps"), [("ode", 0.7, 10), ("cps", 0.0, 10), ("cps", 0.7, 1)])
def test_schedule_without_any_step_to_train_is_refused(name: str, noise_level: float, num_steps: int) -> None:
    with pytest.raises(ValueError, match="no step is left to train"):
        trainable_steps(name, shifted_sigmas(num_steps), noise_level)
