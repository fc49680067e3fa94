"""The untrained shapes pipeline: words that are tokens, a T5 that says nothing, a folder that plain diffusers loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sfgrpo.pretraining.pipeline import MAX_TEXT_TOKENS, build_pipeline, build_tokenizer
from sfgrpo.shapes.prompt_sets import all_prompts
from tests.support.tiny import build_tiny_pipeline, make_tiny_pipeline

PROMPTS = [prompt for prompts in all_prompts().values() for prompt in prompts]


def test_every_word_of_every_prompt_is_one_token():
    tokenizer = build_tokenizer()
    texts = [prompt.text for prompt in PROMPTS]
    ids = tokenizer(texts).input_ids
    assert [len(row) for row in ids] == [len(text.split()) + 2 for text in texts]
    assert max(len(row) for row in ids) == MAX_TEXT_TOKENS
    words = {word for text in texts for word in text.split()}
    assert len({tuple(tokenizer(word).input_ids) for word in words}) == len(words)


def test_words_come_back():
    tokenizer = build_tokenizer()
    for prompt in PROMPTS[::97]:
        assert tokenizer.decode(tokenizer(prompt.text).input_ids, skip_special_tokens=True).strip() == prompt.text


def test_unknown_words_fall_apart_and_case_does_not_matter():
    tokenizer = build_tokenizer()
    (start, *letters, end) = tokenizer("zebra").input_ids
    assert len(letters) == 5 and len({start, end, *letters}) >= 6
    assert tokenizer("A Photo").input_ids == tokenizer("a photo").input_ids


def test_tokenizer_is_the_same_every_time():
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("length", [1, 256])
def test_silent_t5_gives_exact_zeros(length):
    pipeline = make_tiny_pipeline()
    embedded = pipeline._get_t5_prompt_embeds(["a photo of a ring", ""], max_sequence_length=length)
    assert embedded.shape == (2, length, pipeline.transformer.config.joint_attention_dim)
    assert torch.equal(embedded, torch.zeros_like(embedded))


def test_untrained_transformer_predicts_nothing():
    pipeline = make_tiny_pipeline()
    fresh = build_pipeline(pipeline.vae, num_layers=1, num_attention_heads=1, attention_head_dim=8, shift=3.0)
    predicted = fresh.transformer(
        hidden_states=torch.randn(1, 4, 8, 8),
        encoder_hidden_states=torch.randn(1, 3, 128),
        pooled_projections=torch.randn(1, 128),
        timestep=torch.tensor([500.0]),
    ).sample
    assert torch.equal(predicted, torch.zeros(1, 4, 8, 8))
    assert fresh.scheduler.config.shift == 3.0


DRAW = """
import sys
import torch
from diffusers import DiffusionPipeline

arguments = {"num_inference_steps": 2, "guidance_scale": 4.5, "output_type": "np"}
for parts, options in (({}, {}), ({"text_encoder_3": None, "tokenizer_3": None}, {"max_sequence_length": 0})):
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], **parts)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a photo of a red circle", generator=generator, **arguments, **options).images[0]
    assert image.shape == (32, 32, 3) and image.std() > 0, image.shape
assert not [name for name in sys.modules if name.partition(".")[0] == "sfgrpo"]
print(type(pipeline).__name__)
"""


@pytest.mark.slow
def test_plain_diffusers_loads_the_folder_and_draws_without_this_package(tmp_path):
    build_tiny_pipeline(tmp_path / "pipeline")
    # -I keeps this repository off the path.
    command = [sys.executable, "-I", "-c", DRAW, "pipeline"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "StableDiffusion3Pipeline"
