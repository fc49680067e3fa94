"""Training of the flow model: it sees what sampling sees, it learns, it resumes bit for bit, its casts are fresh."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from sfgrpo.config.pretrain_schema import TransformerConfig
from sfgrpo.pretraining.flow import PADDING_TOKENS, FlowTraining, encode_tokens, tokenize_captions
from tests.support.tiny import make_tiny_pipeline, make_tiny_policy, tiny_prompts

PROMPTS = tuple(tiny_prompts(4))
CONFIG = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    shift=1.0,
    num_steps=6,
    batch_size=8,
    learning_rate=1e-3,
    muon_learning_rate=1e-2,
    decay_fraction=0.5,
    warmup_steps=2,
    ema_decay=0.9,
    caption_dropout=0.1,
    padded_every_num_steps=4,
    bfloat16=False,
    compile=False,
)


def training(**changes) -> FlowTraining:
    pipeline = make_tiny_pipeline()
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    return FlowTraining(pipeline, dataclasses.replace(CONFIG, **changes))


def steps_of(flow: FlowTraining) -> Iterator[float]:
    """Runs, step by step, on latents that the caption tells apart; gives the losses."""
    index = np.arange(16) % len(PROMPTS)
    generator = torch.Generator().manual_seed(6)
    latents = torch.from_numpy(index).view(-1, 1, 1, 1) - 1.5 + 0.1 * torch.randn(16, 4, 8, 8, generator=generator)
    return (loss for _, loss in flow.run(latents, index, tokenize_captions(flow.pipeline, PROMPTS), seed=3))


def run(flow: FlowTraining, num_steps: int | None = None) -> list[float]:
    """Runs some steps, or all that are left."""
    return list(itertools.islice(steps_of(flow), num_steps))


def weights(pipeline: StableDiffusion3Pipeline) -> list[torch.Tensor]:
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_training_encodes_text_as_sampling_does():
    policy = make_tiny_policy()
    expected = policy.encode([*(prompt.text for prompt in PROMPTS), ""])
    with torch.no_grad():
        tokens, pooled = encode_tokens(policy.pipeline, tokenize_captions(policy.pipeline, PROMPTS))
    assert torch.equal(tokens, expected.tokens) and torch.equal(pooled, expected.pooled)


def test_loss_is_the_error_of_the_velocity():
    flow, latents = training(), torch.randn(5, 4, 8, 8)
    ids = tokenize_captions(flow.pipeline, PROMPTS)
    loss = flow.loss(latents, ids, 0, torch.Generator().manual_seed(1))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    # The untrained transformer predicts zeros.
    torch.testing.assert_close(loss, (noise - latents).square().mean())


def test_a_few_steps_lower_the_loss():
    losses = run(training(num_steps=40, learning_rate=3e-3))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_resumed_training_equals_training_in_one_go(tmp_path):
    whole = training()
    losses = run(whole)
    first = training()
    begun = run(first, 3)
    first.save(tmp_path / "flow.safetensors")
    second = training()
    second.load(tmp_path / "flow.safetensors")
    assert second.step == 3
    assert begun + run(second) == losses and len(losses) == CONFIG.num_steps
    assert_equal(weights(second.pipeline), weights(whole.pipeline))
    for flow in (whole, second):
        flow.use_averaged_weights()
    assert_equal(weights(second.pipeline), weights(whole.pipeline))
    assert [path.name for path in tmp_path.iterdir()] == ["flow.safetensors"]


def test_finished_training_has_no_step_left():
    flow = training(num_steps=1)
    run(flow)
    assert run(flow) == []


def test_averaged_weights_lag_behind():
    flow = training()
    start = [value.clone() for value in weights(flow.pipeline)]
    run(flow)
    last = [value.clone() for value in weights(flow.pipeline)]
    flow.use_averaged_weights()
    far, near = (
        sum(float((one - other).norm()) for one, other in zip(values, start, strict=True))
        for values in (last, weights(flow.pipeline))
    )
    assert 0 < near < far


def test_bfloat16_step_uses_the_weights_of_the_moment(tmp_path):
    """Autocast keeps its casts of the weights until its block ends: a block around all steps once froze them."""
    before, options = 15, {"num_steps": 40, "learning_rate": 3e-3, "padded_every_num_steps": 100}
    flow = training(bfloat16=True, **options)
    flow.save(tmp_path / "start")
    steps = steps_of(flow)
    for _ in range(before):
        next(steps)
    flow.save(tmp_path / "now")
    loss, eager = next(steps), {}
    for name in ("start", "now"):
        other = training(bfloat16=False, **options)
        other.load(tmp_path / name)
        other.step = before
        (eager[name],) = run(other, 1)
    assert eager["start"] > 1.2 * eager["now"], "the weights have to matter"
    assert loss == pytest.approx(eager["now"], rel=0.02)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2 / 3), (5, 1 / 3)])
def test_learning_rate_rises_stays_and_falls(step, factor):
    flow = training()
    flow.step = step
    assert flow.learning_rate_factor() == pytest.approx(factor)


def test_captions_are_dropped_and_padded_as_configured(monkeypatch):
    flow = training(caption_dropout=1.0)
    empty, seen = tokenize_captions(flow.pipeline, PROMPTS)[-1], []
    original = flow.loss

    def watched(latents, token_ids, padding_tokens, generator):
        seen.append((len(latents), padding_tokens))
        assert torch.equal(token_ids, empty.expand_as(token_ids))
        return original(latents, token_ids, padding_tokens, generator)

    monkeypatch.setattr(flow, "loss", watched)
    run(flow, 5)
    assert seen == [(2, PADDING_TOKENS), (8, 0), (8, 0), (8, 0), (2, PADDING_TOKENS)]
