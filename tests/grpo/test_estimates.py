"""Estimates equal posterior means for Gaussian data, and short ODEs converge to the exact one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sfgrpo.grpo.estimates import clean_estimate, substep_sigmas
from sfgrpo.grpo.sde import SAMPLERS
from tests.support import oracles
from tests.support.oracles import GaussianData

SIGMA = torch.tensor([1.0, 0.7, 0.2])
DATA = GaussianData(mean=0.7, std=0.6)


def shifted_sigmas(num_steps: int) -> Tensor:
    return torch.from_numpy(oracles.shifted_sigmas(num_steps, shift=3.0)).float()


def per_sample(function, x: Tensor, sigma: Tensor) -> Tensor:
    """Applies a float64 numpy oracle to each sample at its own sigma."""
    values = [
        torch.as_tensor(function(row.double().numpy(), t)) for row, t in zip(x, sigma.double().tolist(), strict=True)
    ]
    return torch.stack(values).float()


def run_ode(x: Tensor, sigmas: Tensor) -> Tensor:
    """Runs the ODE of Gaussian data over one grid."""
    for t, p in itertools.pairwise(sigmas):
        here, there = t.expand(len(x)), p.expand(len(x))
        velocity = per_sample(DATA.velocity, x, here)
        x = SAMPLERS["ode"](x, velocity, here, there, 0.99, 0.0).mean
    return x


def test_clean_estimate_is_the_posterior_mean() -> None:
    x = torch.randn(3, 2, 4, 4)
    velocity = per_sample(DATA.velocity, x, SIGMA)
    torch.testing.assert_close(clean_estimate(x, velocity, SIGMA), per_sample(DATA.clean, x, SIGMA))


def test_clean_estimate_is_float32_whatever_comes_in() -> None:
    x, velocity = torch.randn(3, 2, 4, 4).bfloat16(), torch.randn(3, 2, 4, 4).half()
    expected = clean_estimate(x.float(), velocity.float(), SIGMA)
    torch.testing.assert_close(clean_estimate(x, velocity, SIGMA), expected, rtol=0, atol=0)


def test_one_substep_is_the_clean_estimate() -> None:
    sigmas = shifted_sigmas(10)
    for state, grid in enumerate(substep_sigmas(sigmas, 1)):
        torch.testing.assert_close(grid, torch.stack([sigmas[state], sigmas[-1]]), rtol=0, atol=0)
        x, sigma = torch.randn(2, 1, 3, 3), sigmas[state].expand(2)
        velocity = per_sample(DATA.velocity, x, sigma)
        torch.testing.assert_close(run_ode(x, grid), clean_estimate(x, velocity, sigma))


@pytest.mark.parametrize("num_substeps", [10, 11, 1000])
def test_enough_substeps_are_the_rest_of_the_schedule(num_substeps: int) -> None:
    sigmas = shifted_sigmas(10)
    for state, grid in enumerate(substep_sigmas(sigmas, num_substeps)):
        torch.testing.assert_close(grid, sigmas[state:], rtol=0, atol=0)


@pytest.mark.parametrize("num_substeps", range(1, 13))
@pytest.mark.parametrize("num_steps", [1, 7, 10])
def test_substeps_are_capped_and_fall_strictly_from_the_state_to_zero(num_steps: int, num_substeps: int) -> None:
    sigmas = shifted_sigmas(num_steps)
    grids = substep_sigmas(sigmas, num_substeps)
    assert [len(grid) - 1 for grid in grids] == [min(num_substeps, num_steps - k) for k in range(num_steps)]
    for state, grid in enumerate(grids):
        assert grid[0] == sigmas[state] and grid[-1] == 0
        assert bool((grid.diff() < 0).all()) and bool(torch.isin(grid, sigmas).all())


def test_substeps_are_even_by_index_of_the_schedule() -> None:
    sigmas = shifted_sigmas(10)
    torch.testing.assert_close(substep_sigmas(sigmas, 5)[0], sigmas[::2], rtol=0, atol=0)
    torch.testing.assert_close(substep_sigmas(sigmas, 2)[3], sigmas[[3, 7, 10]], rtol=0, atol=0)


def test_more_substeps_converge_to_the_exact_ode() -> None:
    sigmas, x = shifted_sigmas(64), torch.randn(2, 1, 4, 4)
    start = sigmas[8]
    exact = per_sample(DATA.ode_end, x, start.expand(2))
    errors = [
        (run_ode(x, substep_sigmas(sigmas, num_substeps)[8]) - exact).abs().max().item()
        for num_substeps in (1, 4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert 1.6 < errors[-2] / errors[-1] < 2.4


def test_no_substeps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_substeps 0 gives no estimate; use at least 1"):
        substep_sigmas(shifted_sigmas(10), 0)
