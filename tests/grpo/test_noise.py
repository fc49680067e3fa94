import itertools

import pytest
import torch

from sfgrpo.grpo.noise import gaussian_noise


def test_noise_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    gaussian_noise(0, "a", 0, [0], (4,))
    assert torch.equal(torch.get_rng_state(), before)


def test_image_gets_the_same_noise_whatever_the_batch():
    whole = gaussian_noise(0, "step_noise", 5, range(8), (3, 4, 4))
    assert torch.equal(gaussian_noise(0, "step_noise", 5, [6, 2], (3, 4, 4)), whole[[6, 2]])


def test_ranks_together_draw_what_one_process_draws():
    whole = gaussian_noise(0, "start_noise", 1, range(8), (4,))
    ranks = [gaussian_noise(0, "start_noise", 1, range(rank, 8, 2), (4,)) for rank in range(2)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), whole)


def test_no_two_addresses_share_noise():
    noise = torch.stack(
        [
            gaussian_noise(seed, stream, update, [image], (2,))[0]
            for seed, stream, update, image in itertools.product(
                range(2), ("start_noise", "step_noise", "a", "a1"), range(12), range(12)
            )
        ]
    )
    assert len(noise.unique(dim=0)) == len(noise)


def test_seeds_that_agree_in_32_bits_differ():
    assert not torch.equal(gaussian_noise(1, "a", 0, [0], (4,)), gaussian_noise(1 + 2**32, "a", 0, [0], (4,)))


def test_noise_is_standard_normal_and_uncorrelated_between_images():
    noise = gaussian_noise(0, "a", 0, range(2000), (16,))
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.02
    torch.testing.assert_close(noise.T.cov(), torch.eye(16), atol=0.12, rtol=0)
    neighbours = (noise[:-1] * noise[1:]).mean()
    assert neighbours.abs() < 0.02


def test_noise_of_no_image_is_empty():
    assert gaussian_noise(0, "a", 0, [], (3, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_noise_has_the_shape_asked_for(shape):
    assert gaussian_noise(0, "a", 0, [4, 4], shape).shape == (2, *shape)


def test_noise_is_pinned():
    # A change of these numbers, by us or by numpy, changes the result of every run.
    expected = torch.tensor([[-0.6384180, 0.0779346, 0.6917469]])
    torch.testing.assert_close(gaussian_noise(0, "start_noise", 0, [0], (3,)), expected, rtol=0, atol=1e-6)
