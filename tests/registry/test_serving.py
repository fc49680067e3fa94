"""What the registered model refuses: files that were not registered, and requests beyond its limits."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException

from sfgrpo.config.schema import RegistryConfig
from sfgrpo.config.stages import RegisterStage
from sfgrpo.errors import ConfigError
from sfgrpo.registry.drawing import PNG_SIGNATURE
from sfgrpo.registry.register import TrainedAdapter, register_version
from tests.support.registry import draw
from tests.support.tiny import build_tiny_adapter, build_tiny_pipeline, tiny_serving
from tests.support.tiny_run import TINY, write_params

with warnings.catch_warnings():
    # MLflow's own, at its import.
    warnings.simplefilter("ignore")
    from sfgrpo.registry.serving import LIMITS, MAX_CHARACTERS, MAX_SEED, check_request, verify_files

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

SETTINGS = {"max_prompts": 4, "max_steps": 10, "max_guidance_scale": 10.0}
RING = "a photo of a ring"
LONG = " ".join(["ring"] * 100)
"""More tokens than the text encoder takes."""

PROMPTS: dict[str, tuple[Any, str]] = {
    "none": ([], "a request has 0 prompts instead of 1 to 4"),
    "too many": ([RING] * 5, "a request has 5 prompts instead of 1 to 4; send the others by further requests"),
    "empty": ([""], "prompt 0 is empty"),
    "blank": ([RING, " \t\n"], "prompt 1 is empty"),
    "number": ([1], "prompt 0 is 1 instead of a text"),
    "boolean": ([True], "prompt 0 is True instead of a text"),
    "nothing": ([None], "prompt 0 is None instead of a text"),
    "NaN": ([RING, math.nan], "prompt 1 is nan instead of a text"),
    "bytes": ([b"ring"], "prompt 0 is b'ring' instead of a text"),
    "list": ([[RING]], "prompt 0 is \\['a photo of a ring'\\] instead of a text"),
    "mapping": ([{"text": RING}], "prompt 0 is {'text': .* instead of a text"),
    "megabytes": (["a" * 10**7], f"prompt 0 has 10000000 characters instead of {MAX_CHARACTERS} at most"),
    "lone surrogate": (["\ud800"], "prompt 0 holds half a character"),
}
PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name} {number}": ({name: value}, f"{name} .* is not an integer in")
        for name, values in {
            "num_inference_steps": (0, -1, 11, 10**8, 2.0, 2.5, "2", True, None, [2], math.nan, math.inf, 10**5000 + 1),
            "seed": (-1, MAX_SEED + 1, 2**64, 1.0, "1", False, None, [1], math.nan, 10**400),
        }.items()
        for number, value in enumerate(values)
    },
    **{
        f"guidance_scale {number}": ({"guidance_scale": value}, "guidance_scale .* is not a number in 0..10.0")
        for number, value in enumerate(
            (-0.1, -3.5, 10.1, 1e300, math.nan, math.inf, -math.inf, "3", True, None, [3.0], 10**400, 10**5000)
        )
    },
    **{
        f"unknown {name}": ({name: 1}, f"'{name}' is no parameter of a request; allowed are num_inference_steps, gui")
        for name in ("steps", "resolution", "height", "num_images_per_prompt", "max_steps", "callback", "")
    },
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_no_texts_or_too_many_are_refused(case):
    prompts, complaint = PROMPTS[case]
    refused(prompts, {}, complaint)


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_out_of_range_or_of_other_types_are_refused(case):
    params, complaint = PARAMS[case]
    refused([RING], params, complaint)


def refused(prompts: list[Any], params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MlflowException, match=complaint) as refusal:
        check_request(prompts, params, SETTINGS)
    assert refusal.value.get_http_status_code() == 400
    assert "\n" not in refusal.value.message and len(refusal.value.message) < 200


@pytest.mark.parametrize("seed", range(60))
def test_what_is_accepted_is_within_all_limits(seed):
    chance = random.Random(seed)
    prompts = [chance.choice([RING, "", " ", "\u00e9", "x" * 50]) for _ in range(chance.randrange(7))]
    choices: dict[str, list[Any]] = {
        "num_inference_steps": [*range(-2, 13), 2.0, True, None],
        "seed": [0, 1, MAX_SEED, MAX_SEED + 1, -1, chance.randrange(2**70), "0"],
        "guidance_scale": [chance.uniform(-2, 12), 0, 10, 11, math.nan, math.inf, -math.inf, 1e-300],
    }
    params = {name: chance.choice(values) for name, values in choices.items() if chance.random() < 0.5}
    try:
        check_request(prompts, params, SETTINGS)
    except MlflowException:
        return
    assert 1 <= len(prompts) <= 4 and all(prompt.strip() for prompt in prompts)
    assert 1 <= params.get("num_inference_steps", 1) <= 10
    assert 0 <= params.get("seed", 0) <= MAX_SEED
    assert 0 <= params.get("guidance_scale", 0) <= 10


def test_versions_without_limits_have_those_of_the_code():
    check_request([RING] * int(LIMITS["max_prompts"]), {"num_inference_steps": 100, "guidance_scale": 20}, {})
    with pytest.raises(MlflowException, match="instead of 1 to 16"):
        check_request([RING] * 17, {}, {})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    build_tiny_adapter(build_tiny_pipeline(folder / "pipeline"), folder / "adapter")
    register_version(
        uri=uri_of(folder),
        experiment="tests",
        registry=RegistryConfig(model_name="served", alias="challenger"),
        adapter=TrainedAdapter(folder=folder / "adapter", metrics={}, provenance={"git_commit": "c"}, run_id=None),
        serving=tiny_serving(folder / "pipeline"),
        scratch=folder / ".scratch",
    )
    return folder


def uri_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(scope="module")
def files(store: Path) -> Path:
    (model_file,) = (store / "mlartifacts").rglob("MLmodel")
    return model_file.parent


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[TestClient]:
    """What `mlflow models serve` runs, without its process."""
    import mlflow
    from mlflow.pyfunc import scoring_server

    with TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(files)))) as client:
        yield client


def ask(server: TestClient, inputs: Any, params: Any = None) -> tuple[int, str]:
    question = {"inputs": inputs} | ({} if params is None else {"params": params})
    answer = server.post("/invocations", content=json.dumps(question), headers={"Content-Type": "application/json"})
    return answer.status_code, answer.text


def test_server_draws_within_the_limits(server):
    status, text = ask(server, [RING], {"seed": MAX_SEED, "num_inference_steps": 10, "guidance_scale": 10})
    assert status == 200, text
    assert len(json.loads(text)["predictions"]) == 1


@pytest.mark.parametrize(
    "params",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": 100_000_000},
        {"num_inference_steps": None},
        {"num_inference_steps": True},
        {"num_inference_steps": 2.5},
        {"seed": -1},
        {"seed": 2**70},
        {"guidance_scale": -3.5},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"guidance_scale": "3"},
        [1],
        "x",
    ],
)
def test_server_answers_wrong_parameters_with_400(server, params):
    assert ask(server, [RING], params)[0] == 400


@pytest.mark.parametrize("inputs", [[], [""], [RING] * 5, ["a" * 10**6], [LONG], {"x": []}, None, [{"a": 1}]])
def test_server_answers_wrong_prompts_with_400(server, inputs):
    assert ask(server, inputs)[0] == 400


def test_prompt_that_the_text_encoder_would_cut_is_refused_in_one_sentence(server):
    status, text = ask(server, [RING, LONG])
    message = json.loads(text)["message"].partition("Error: ")[2]
    assert status == 400
    assert re.fullmatch(r"prompt 1 has \d+ tokens and the text encoder takes 12; shorten it, since .*drawn", message)


def test_longest_prompt_that_fits_is_drawn(server):
    # The encoders of the tiny pipeline take 12 tokens, with those of start and end.
    assert ask(server, [" ".join(["ring"] * 10)])[0] == 200
    assert ask(server, [" ".join(["ring"] * 11)])[0] == 400


@pytest.mark.parametrize(
    ("prompts", "params", "complaint"),
    [
        ([LONG], {}, "models:/served/1: prompt 0 has 102 tokens and the text encoder takes 12"),
        ([RING], {"num_inference_steps": 11}, "models:/served/1: num_inference_steps 11 is not an integer in 1..10"),
        ([RING], {"steps": 2}, "models:/served/1: 'steps' is no parameter of a request"),
        ([RING] * 5, {}, "models:/served/1: a request has 5 prompts instead of 1 to 4"),
    ],
)
def test_commands_refuse_the_same(store, prompts, params, complaint):
    with pytest.raises(ConfigError, match=complaint):
        draw(uri_of(store), "models:/served/1", prompts, **params)


def test_limits_are_part_of_the_version(files):
    text = (files / "MLmodel").read_text()
    assert all(f"      {name}: {value}\n" in text for name, value in SETTINGS.items())


def test_operator_who_loads_the_model_may_set_other_limits(files):
    import mlflow

    model = mlflow.pyfunc.load_model(str(files), model_config={"max_prompts": 1})
    with pytest.raises(MlflowException, match="a request has 2 prompts instead of 1 to 1"):
        model.predict([RING, RING])
    assert model.predict([RING])["png"][0].startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda folder: flip(folder / "artifacts/pipeline/vae/diffusion_pytorch_model.safetensors"),
            "vae.* is damaged",
        ),
        (lambda folder: flip(folder / "artifacts/adapter/pytorch_lora_weights.safetensors"), "lora.* is damaged"),
        (lambda folder: flip(folder / "MLmodel"), "MLmodel is damaged: expected sha256"),
        (lambda folder: flip(folder / "artifacts/pipeline/model_index.json"), "model_index.json is damaged"),
        (lambda folder: (folder / "artifacts/more.json").write_text("{}"), "more.json is not registered"),
        (lambda folder: (folder / "artifacts/pipeline/model_index.json").unlink(), "model_index.json is absent"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is no manifest of the files beside it"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is no manifest"),
    ],
)
def test_model_that_is_loaded_by_anybody_refuses_other_files(files, tmp_path, change, complaint):
    folder = Path(shutil.copytree(files, tmp_path / "model"))
    change(folder)
    with pytest.raises(RuntimeError, match=complaint):
        verify_files(folder)


def test_what_mlflow_and_python_add_is_no_damage(files, tmp_path):
    folder = Path(shutil.copytree(files, tmp_path / "model"))
    (folder / "registered_model_meta").write_text("model_name: x\n")
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__/serving.pyc").touch()
    verify_files(folder)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def test_served_code_verifies_before_it_loads(files, tmp_path):
    import mlflow

    folder = Path(shutil.copytree(files, tmp_path / "model"))
    flip(folder / "artifacts/pipeline/transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match=r"transformer.* is damaged"):
        mlflow.pyfunc.load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"serving.max_steps": 1, "evaluation.num_steps": 2},
            "serving.max_steps: 1 is less than the 2 that the version",
        ),
        ({"serving.max_guidance_scale": 0.5}, "serving.max_guidance_scale: 0.5 is less than the 1.0 that"),
        ({"serving.max_prompts": 0}, "serving.max_prompts: 0 is not greater than 0"),
        ({"serving.max_steps": 10**9}, "serving.max_steps: 1000000000 is not"),
    ],
)
def test_limits_are_checked_as_parameters(tmp_path, changes, complaint):
    from sfgrpo.config.stages import load_config

    write_params(tmp_path, {**TINY, **changes})
    with pytest.raises(ConfigError, match=complaint):
        load_config(RegisterStage, tmp_path / "params.yaml")
