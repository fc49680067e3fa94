"""The schedule equals the one that diffusers gives Stable Diffusion 3."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.grpo.schedule import shifted_sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 28, 40])
def test_schedule_equals_diffusers(num_steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(shifted_sigmas(num_steps, shift), scheduler.sigmas, rtol=0, atol=1e-7)


def test_ten_steps_at_shift_three_are_the_labels_of_the_paper() -> None:
    expected = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0])
    torch.testing.assert_close(shifted_sigmas(10, 3.0), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shift", [0.3, 1.0, 2.3, 9.0])
def test_sigmas_fall_strictly_from_one_to_zero(shift: float) -> None:
    sigmas = shifted_sigmas(17, shift)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (18,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps 0 gives no schedule; use at least 1"):
        shifted_sigmas(0, 3.0)


def test_shift_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shift 0\.0 is not positive"):
        shifted_sigmas(10, 0.0)
