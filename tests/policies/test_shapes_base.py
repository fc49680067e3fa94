"""The shipped base model: intact, small, free of pickles, drawn from by plain diffusers, and honest about itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.config.stages import PretrainStage, load_config
from sfgrpo.runtime.manifest import verify_manifest
from tests.support.tiny_run import ROOT

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BASE = ROOT / "models/shapes-base"
MAX_BYTES = 25_000_000
TEXT = {".json", ".txt", ".md"}
DRAW = """
import sys
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("a photo of a red circle", guidance_scale=4.5, num_inference_steps=4).images[0]
assert not [name for name in sys.modules if name.startswith("sfgrpo")]
assert image.getextrema() != ((0, 0),) * 3
print(type(pipeline).__name__, *image.size)
"""


@pytest.fixture(scope="module")
def card() -> str:
    return (BASE / "README.md").read_text(encoding="utf-8")


def test_files_are_those_of_the_manifest():
    verify_manifest(BASE)


def test_model_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= MAX_BYTES


def test_weights_are_safetensors_and_everything_else_is_text():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", *TEXT}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} >= {"transformer", "vae"}


def test_flipped_byte_is_named_with_the_expected_digest(tmp_path, monkeypatch, capsys):
    shutil.copytree(BASE, tmp_path / "models/shapes-base")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    weights = Path("models/shapes-base/vae/diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["evaluate"]) == 1
    assert re.search(rf"error: {weights} is damaged: expected sha256 [0-9a-f]{{64}} of", capsys.readouterr().err)


@pytest.mark.slow
def test_plain_diffusers_loads_it_and_draws(tmp_path):
    # Isolated: neither this folder nor PYTHONPATH is where Python looks for modules.
    command = [sys.executable, "-I", "-c", DRAW, str(BASE)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["StableDiffusion3Pipeline", "32", "32"]


def test_card_names_what_params_yaml_says(card):
    stage = load_config(PretrainStage, ROOT / "params.yaml")
    recipe = stage.pretrain
    for fact in (
        f"seed {stage.seed}",
        f"{recipe.num_images:,} rendered pictures",
        f"{recipe.autoencoder.num_steps:,} steps of {recipe.autoencoder.batch_size}",
        f"{recipe.transformer.num_steps:,} steps of {recipe.transformer.batch_size}",
    ):
        assert fact in card


def test_card_names_time_and_machine(card):
    assert re.search(r"^\| Time \| autoencoder \d+ min, flow model \d+ min \|$", card, re.MULTILINE)
    assert re.search(r"^\| Machine \| \d+ CPU cores .* torch \d", card, re.MULTILINE)


def test_card_has_a_row_of_scores_for_every_guidance_scale(card):
    scales = load_config(PretrainStage, ROOT / "params.yaml").pretrain.evaluation.guidance_scales
    assert {1.0, 4.5} <= set(scales)
    cell = r"\| \d\.\d\d ± \d\.\d\d "
    for scale in scales:
        assert re.search(rf"^\| guidance {scale:g} {cell * 7}\|$", card, re.MULTILINE)


@pytest.mark.slow
def test_single_objects_are_drawn_as_asked():
    from sfgrpo.evaluation.evaluate import SamplingProtocol, evaluate_policy
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.shapes.prompt_sets import all_prompts

    policy = SD3Policy.from_pretrained(
        BASE, resolution=32, max_sequence_length=0, lora_rank=1, lora_alpha=1, lora_targets=("to_q",)
    )
    evaluation = evaluate_policy(
        policy,
        all_prompts()["single_object"],
        (),
        SamplingProtocol(images_per_prompt=16, num_steps=20, guidance_scale=4.5, seed=0, micro_batch_size=96),
    )
    assert evaluation.correct.mean() > 0.7
