"""The contract of policies, run over all of them, and what is special about SD3."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from sfgrpo.errors import AdapterError
from sfgrpo.policies.base import Policy
from sfgrpo.policies.sd3 import SD3Policy
from tests.support import oracles
from tests.support.paths import ROOT
from tests.support.tiny import build_tiny_pipeline, counted_passes, disturb, make_tiny_pipeline, make_tiny_policy

POLICIES = {"sd3": make_tiny_policy}
"""Every policy with the function that makes a small one; options are those of the adapter."""

TEXTS = ["a photo of a red circle", "a photo of two rings", "a photo of a heart"]


@pytest.fixture(params=POLICIES)
def make(request: pytest.FixtureRequest):
    return POLICIES[request.param]


@pytest.fixture
def policy(make) -> Policy:
    return make()


def inputs(policy: Policy):
    """Return states, noise levels and conditioning of three images."""
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS)


def test_shapes_and_dtypes_are_those_of_the_contract(policy):
    latents, sigma, conditioning = inputs(policy)
    assert len(conditioning) == 3 and len(conditioning.pooled) == 3
    velocity = policy.velocity(latents, sigma, conditioning)
    assert velocity.shape == latents.shape and velocity.dtype == torch.float32
    images = policy.decode(latents)
    assert images.dtype == np.uint8 and images.shape[0] == 3 and images.shape[3] == 3


def test_sigmas_fall_from_one_to_zero(policy):
    sigmas = policy.sigmas(4)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == 5
    assert bool((sigmas.diff() < 0).all())


def test_same_inputs_give_the_same_outputs(make):
    first, second = make(), make()
    for one, other in zip(first.adapter_parameters().values(), second.adapter_parameters().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.velocity(*inputs(first)), second.velocity(*inputs(second)))
    assert np.array_equal(first.decode(inputs(first)[0]), second.decode(inputs(second)[0]))


def test_seed_decides_the_adapter_and_leaves_the_global_generator_alone(make):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = make(seed=1), make(seed=2)
    assert not all(
        torch.equal(one, second.adapter_parameters()[name]) for name, one in first.adapter_parameters().items()
    )
    torch.manual_seed(5)
    make(seed=3)
    assert torch.equal(torch.rand(1), expected)


def test_images_of_a_batch_do_not_mix_and_each_has_its_own_time(policy):
    latents, sigma, conditioning = inputs(policy)
    single = [policy.velocity(latents[[i]], sigma[[i]], conditioning[[i]]) for i in range(3)]
    torch.testing.assert_close(policy.velocity(latents, sigma, conditioning), torch.cat(single), rtol=1e-4, atol=1e-5)


def test_guidance_of_one_costs_one_pass_and_any_other_two(policy):
    arguments = inputs(policy)
    for scale, passes in ((1.0, 3), (4.5, 6)):
        with counted_passes(policy) as sizes:
            policy.velocity(*arguments, scale)
        assert sum(sizes) == passes


def test_guidance_extrapolates_from_the_empty_text(policy):
    latents, sigma, conditioning = inputs(policy)
    with_text = policy.velocity(latents, sigma, conditioning)
    without = policy.velocity(latents, sigma, policy.encode([""] * 3))
    guided = policy.velocity(latents, sigma, conditioning, 4.5)
    assert not torch.allclose(with_text, without)
    torch.testing.assert_close(guided, without + 4.5 * (with_text - without), rtol=1e-4, atol=1e-4)


def test_adapter_is_all_that_learns(policy):
    policy.velocity(*inputs(policy)).square().mean().backward()
    adapter = policy.adapter_parameters()
    learning = {name for name, parameter in policy.module.named_parameters() if parameter.grad is not None}
    assert learning == set(adapter) and all("lora_" in name for name in adapter)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.values())


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_fresh_adapter_changes_nothing_and_the_reference_stays_there(policy, scale):
    arguments = inputs(policy)
    start = policy.velocity(*arguments, scale).detach()
    assert torch.equal(policy.reference_velocity(*arguments, scale), start)
    disturb(policy)
    assert not torch.allclose(policy.velocity(*arguments, scale), start)
    assert torch.equal(policy.reference_velocity(*arguments, scale), start)


def test_reference_leaves_no_gradient_and_the_adapter_as_it_was(policy):
    arguments = inputs(policy)
    disturb(policy)
    adapter, before = policy.adapter_parameters(), policy.velocity(*arguments)
    assert not policy.reference_velocity(*arguments).requires_grad
    assert all(parameter.grad is None for parameter in adapter.values())
    assert policy.adapter_parameters().keys() == adapter.keys()
    assert torch.equal(policy.velocity(*arguments), before)


def test_saved_adapter_comes_back_bit_for_bit(make, tmp_path):
    policy, other = make(), make(seed=9)
    disturb(policy)
    policy.save_adapter(tmp_path)
    other.load_adapter(tmp_path)
    for name, parameter in policy.adapter_parameters().items():
        assert torch.equal(other.adapter_parameters()[name], parameter)
    assert torch.equal(other.velocity(*inputs(other)), policy.velocity(*inputs(policy)))


def test_adapter_of_other_layers_is_refused(make, tmp_path):
    make(lora_targets=("to_q",)).save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"does not fit the policy: it was trained with \['to_q'\]"):
        make().load_adapter(tmp_path)


def test_layers_that_do_not_exist_are_refused(make):
    with pytest.raises(ValueError, match=r"lora_targets \['to_z'\] match no linear layer of the transformer"):
        make(lora_targets=("to_q", "to_z"))


def test_resolution_that_the_model_cannot_draw_is_refused(make):
    with pytest.raises(ValueError, match=r"policy.resolution 36 is not a multiple of 8"):
        make(resolution=36)


def sigmas_at_shift(shift: float, num_steps: int) -> torch.Tensor:
    pipeline = make_tiny_pipeline()
    pipeline.scheduler.register_to_config(shift=shift)
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config))
    return make_tiny_policy(pipeline).sigmas(num_steps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("num_steps", [1, 10, 40])
def test_sigmas_of_sd3_are_the_shifted_grid(shift, num_steps):
    sigmas = sigmas_at_shift(shift, num_steps)
    assert sigmas.dtype == torch.float32 and sigmas[0] == 1 and sigmas[-1] == 0
    expected = torch.from_numpy(oracles.shifted_sigmas(num_steps, shift)).float()
    torch.testing.assert_close(sigmas, expected, rtol=1e-5, atol=1e-6)


def test_ten_steps_at_shift_three_are_the_labels_of_the_paper():
    expected = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0])
    torch.testing.assert_close(sigmas_at_shift(3.0, 10), expected, rtol=0, atol=5e-5)


def test_bfloat16_policy_gives_float32_velocities_and_trains_a_float32_adapter():
    policy = make_tiny_policy(make_tiny_pipeline().to(torch.bfloat16), dtype=torch.bfloat16)
    latents, sigma, conditioning = inputs(policy)
    assert conditioning.tokens.dtype == torch.bfloat16
    velocity = policy.velocity(latents, sigma, conditioning)
    assert velocity.dtype == torch.float32
    velocity.square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in policy.adapter_parameters().values())
    exact = make_tiny_policy()
    torch.testing.assert_close(velocity, exact.velocity(*inputs(exact)), rtol=0.1, atol=0.2)
    assert policy.decode(latents).shape == (3, 32, 32, 3)


def test_bfloat16_velocity_follows_the_adapter():
    policy = make_tiny_policy(make_tiny_pipeline().to(torch.bfloat16), dtype=torch.bfloat16)
    before = policy.velocity(*inputs(policy))
    disturb(policy)
    assert not torch.allclose(policy.velocity(*inputs(policy)), before)


def loud_pipeline() -> StableDiffusion3Pipeline:
    """Makes a pipeline whose T5 says something."""
    pipeline = make_tiny_pipeline()
    torch.nn.init.ones_(pipeline.text_encoder_3.encoder.final_layer_norm.weight)
    return pipeline


@pytest.mark.parametrize(("length", "tokens"), [(0, 12), (4, 16)])
def test_t5_adds_its_tokens_or_is_left_out(length, tokens):
    policy = make_tiny_policy(loud_pipeline(), max_sequence_length=length)
    latents, sigma, conditioning = inputs(policy)
    assert conditioning.tokens.shape == (3, tokens, 128)
    assert (policy.pipeline.text_encoder_3 is None) == (length == 0)
    assert policy.velocity(latents, sigma, conditioning, 2.0).shape == latents.shape
    if length:
        assert bool(conditioning.tokens[:, 12:].any())


@pytest.mark.parametrize("files_of_t5", [True, False])
def test_policy_without_t5_loads_whether_or_not_the_pipeline_has_one(tmp_path, files_of_t5):
    pipeline = make_tiny_pipeline()
    if not files_of_t5:
        pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    policy = SD3Policy.from_pretrained(
        tmp_path, resolution=32, max_sequence_length=0, lora_rank=2, lora_alpha=4, lora_targets=("to_q",)
    )
    expected = make_tiny_policy()
    assert torch.equal(policy.velocity(*inputs(policy)), expected.velocity(*inputs(expected)))


def test_plain_diffusers_loads_the_adapter_and_gives_the_same_velocity(tmp_path):
    build_tiny_pipeline(tmp_path / "pipeline")
    policy = make_tiny_policy()
    disturb(policy)
    (tmp_path / "adapter").mkdir()
    policy.save_adapter(tmp_path / "adapter")
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    plain.load_lora_weights(tmp_path / "adapter")
    latents, sigma, conditioning = inputs(policy)
    velocity = plain.transformer(
        hidden_states=latents,
        encoder_hidden_states=conditioning.tokens,
        pooled_projections=conditioning.pooled,
        timestep=sigma * 1000,
    ).sample
    torch.testing.assert_close(velocity, policy.velocity(latents, sigma, conditioning), rtol=1e-5, atol=1e-6)


SAVE_ADAPTER = """
import sys
from pathlib import Path
from tests.support.tiny import disturb, make_tiny_policy

policy = make_tiny_policy()
disturb(policy)
policy.save_adapter(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_equal_adapters_are_equal_files_in_every_process(tmp_path):
    policy = make_tiny_policy()
    disturb(policy)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    policy.save_adapter(tmp_path / "here")
    # A seed of its own, because the order of a set of strings depends on it.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SAVE_ADAPTER, str(tmp_path / "there")], check=True, env=environment)
    (here,), (there,) = ((tmp_path / name).iterdir() for name in ("here", "there"))
    assert here.name == there.name == "pytorch_lora_weights.safetensors"
    assert here.read_bytes() == there.read_bytes()
