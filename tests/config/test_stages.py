import ast
import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sfgrpo.config import schema
from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import (
    STAGES,
    PretrainStage,
    PromptsStage,
    StageType,
    TrainStage,
    config_digest,
    load_config,
    to_flat_dict,
)
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.runtime.environment import Environment, read_environment
from tests.support.paths import ROOT

PARAMS = ROOT / "params.yaml"
SHIPPED = YAML(typ="safe", pure=True).load(PARAMS.read_text())
# What the tests count with, so that tuning the shipped values does not touch them.
PINNED: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 10},
    "rollout": {"prompts_per_update": 8, "group_size": 24, "micro_batch_size": 96},
    "estimates": {"num_substeps": 2},
    "update": {
        "num_updates": 60,
        "steps_per_update": 2,
        "learning_rate": 1e-3,
        "trained_steps": None,
        "micro_batch_size": 96,
    },
    "checkpoint": {"every_num_updates": 10},
    "evaluation": {"every_num_updates": 20},
}
EXAMPLE = {
    name: values | PINNED.get(name, {}) if isinstance(values, dict) else values for name, values in SHIPPED.items()
}


def load(tmp_path: Path, changes: dict[str, Any], stage: type[StageType] = TrainStage) -> StageType:
    """Load the example parameters with values replaced by dotted path."""
    values = copy.deepcopy(EXAMPLE)
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[key] = value
    path = tmp_path / "params.yaml"
    YAML(typ="safe", pure=True).dump(values, path)
    return load_config(stage, path)


@pytest.fixture
def train(tmp_path: Path) -> TrainStage:
    config: TrainStage = load(tmp_path, {})
    return config


@pytest.mark.parametrize("stage", STAGES)
def test_shipped_parameters_load_for_every_stage(stage):
    assert isinstance(load_config(stage, PARAMS), stage)


def test_shipped_parameters_are_exactly_the_sections_of_the_stages():
    known = {field.name for stage in STAGES for field in dataclasses.fields(stage)}
    assert set(SHIPPED) == known


def test_every_parameter_says_what_it_means():
    for cls in ast.parse(inspect.getsource(schema)).body:
        if isinstance(cls, ast.ClassDef):
            for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{cls.name}.{ast.unparse(field.target)} has no docstring below it"


def test_parameters_do_not_say_where_a_run_happens():
    text = PARAMS.read_text().lower()
    assert not [word for word in ("uri", "token", "cache", "device", "://", "scratch") if word in text]


def test_sections_are_frozen_and_take_keywords_only(train):
    with pytest.raises(dataclasses.FrozenInstanceError):
        train.sampling.num_steps = 3
    with pytest.raises(ValueError, match="positional"):
        type(train.ema)(0.9)


def test_numbers_in_scientific_notation_are_numbers(train):
    assert train.update.learning_rate == 1e-3
    assert train.update.weight_decay == 1e-4


def test_misspelt_key_is_reported_with_its_path_and_the_nearest_one(tmp_path):
    with pytest.raises(
        ConfigError, match=r"params\.yaml: rollout\.group_sice: unknown key; allowed are .*did you mean"
    ):
        load(tmp_path, {"rollout.group_sice": 24})


def test_misspelt_key_of_a_nested_section_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"pretrain\.autoencoder\.kl_weigth: .* did you mean kl_weight\?"):
        load(tmp_path, {"pretrain.autoencoder.kl_weigth": 1.0}, stage=PretrainStage)


def test_unknown_section_is_an_error_for_every_stage(tmp_path):
    for stage in STAGES:
        with pytest.raises(ConfigError, match=r"params\.yaml: sampler: unknown key; .*did you mean sampling\?"):
            load(tmp_path, {"sampler": {}}, stage)


def test_missing_key_is_reported(tmp_path):
    values = {key: value for key, value in EXAMPLE["rollout"].items() if key != "group_size"}
    with pytest.raises(ConfigError, match=r"rollout\.group_size: missing"):
        load(tmp_path, {"rollout": values})


def test_missing_section_is_reported(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("seed: 0")
    with pytest.raises(ConfigError, match=r"params\.yaml: prompts: missing"):
        load_config(PromptsStage, path)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("update.learning_rate", -1, "update.learning_rate: -1 is not greater than 0"),
        ("update.learning_rate", "1e-3", "update.learning_rate: '1e-3' is not a valid number"),
        ("update.learning_rate", float("nan"), "update.learning_rate: nan is not a finite number"),
        ("update.clip_range", 1.0, "update.clip_range: 1.0 is not less than 1"),
        ("update.betas", [0.9], "update.betas.1: missing"),
        ("update.betas", [0.9, 1.0], "update.betas.1: 1.0 is not less than 1"),
        ("rollout.group_size", 1, "rollout.group_size: 1 is not greater than or equal to 2"),
        ("rollout.group_size", True, "rollout.group_size: True is not a valid integer"),
        ("rollout.group_size", 24.0, "rollout.group_size: 24.0 is not a valid integer"),
        ("rollout", [8, 24], r"rollout: \[8, 24\] is not a mapping"),
        ("sampling.sampler", "euler", "sampling.sampler: 'euler' is not 'flow_sde', 'ddim_sde', 'cps' or 'ode'"),
        ("sampling.guidance_scale", 0.5, "sampling.guidance_scale: 0.5 is not greater than or equal to 1"),
        ("policy.dtype", "float64", "policy.dtype: 'float64' is not 'float32', 'bfloat16' or 'float16'"),
        ("policy.lora_targets", [], r"policy.lora_targets: \[\] is not allowed: Tuple should have at least 1 item"),
        ("ema.decay", 1.0, "ema.decay: 1.0 is not less than 1"),
        ("seed", -1, "seed: -1 is not greater than or equal to 0"),
    ],
)
def test_value_out_of_range_is_reported(tmp_path, path, value, problem):
    with pytest.raises(ConfigError, match=rf"params\.yaml: {problem}"):
        load(tmp_path, {path: value})


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"ema.decay": 2, "seed": "zero", "reward.nam": "geneval"})
    assert len(str(caught.value).splitlines()) == 3


def test_task_left_out_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.num_evaluation: .*counting.* missing; give every task a number"):
        load(tmp_path, {"prompts.num_evaluation": {"single_object": 1}}, stage=PromptsStage)


def test_unknown_task_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"task_weights\.color: 'color' is not 'single_object', .*"):
        load(tmp_path, {"prompts.task_weights.color": 1}, stage=PromptsStage)


def test_tasks_that_are_all_zero_are_refused(tmp_path):
    weights = dict.fromkeys(SHIPPED["prompts"]["task_weights"], 0)
    with pytest.raises(ConfigError, match="every task has 0; give at least one"):
        load(tmp_path, {"prompts.task_weights": weights}, stage=PromptsStage)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"rollout.micro_batch_size": 36},
            r"rollout\.micro_batch_size: 36 does not divide rollout\.prompts_per_update \* rollout\.group_size / "
            r"update\.steps_per_update = 8 \* 24 / 2 = 96; use 32 or 48",
        ),
        (
            {"update.steps_per_update": 3},
            r"update\.steps_per_update: 3 does not divide rollout\.prompts_per_update = 8; use 2 or 4",
        ),
        (
            {"update.micro_batch_size": 64},
            r"update\.micro_batch_size: 64 does not divide rollout\.prompts_per_update \* rollout\.group_size / "
            r"update\.steps_per_update = 8 \* 24 / 2 = 96; use 48 or 96",
        ),
        ({"sampling.sampler": "ode"}, "sampling.sampler: 'ode' is deterministic: no step has a density to train"),
        ({"sampling.noise_level": 0}, "sampling.noise_level: 0 is deterministic: no step has a density to train"),
        ({"sampling.sampler": "cps", "sampling.noise_level": 1.2}, "noise_level: 1.2 asks sampler cps for more noise"),
        ({"update.trained_steps": [0, 9]}, r"\[0, 9\] is not an ascending list of steps in .* = 0\.\.8; the last"),
        ({"update.trained_steps": [1, 0]}, r"\[1, 0\] is not an ascending list"),
        ({"update.trained_steps": [1, 1]}, r"\[1, 1\] is not an ascending list"),
        ({"advantage.std": "global"}, "advantage.std: 'global' is a choice of Flow-GRPO only"),
        (
            {"evaluation.every_num_updates": 25},
            r"evaluation\.every_num_updates: 25 is not a multiple of checkpoint\.every_num_updates = 10.*; use 20",
        ),
        ({"evaluation.every_num_updates": 3}, "use 10"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused_with_the_cure(tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, changes)


def test_several_conflicts_are_reported_each_on_its_own_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"sampling.sampler": "ode", "rollout.micro_batch_size": 36})
    assert all(line.startswith(str(tmp_path)) for line in str(caught.value).splitlines())
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage.credit": "terminal", "advantage.std": "global"},
        {"sampling.noise_level": 1.2},
        {"sampling.sampler": "cps", "sampling.noise_level": 1.0},
        {"update.trained_steps": [0, 8]},
        {"evaluation.every_num_updates": 10},
    ],
)
def test_parameters_at_the_edge_of_what_fits_are_taken(tmp_path, changes):
    load(tmp_path, changes)


def test_all_but_the_last_step_are_trained_unless_listed(train, tmp_path):
    assert train.trained_steps == tuple(range(9))
    assert load(tmp_path, {"update.trained_steps": [0, 3]}).trained_steps == (0, 3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- 1", "holds list instead of a mapping"),
        ("", "holds NoneType instead of a mapping"),
        ("seed: [0\nprompts: 1", r"line 2: .*; correct the YAML"),
        ("seed: 0\nseed: 1", "line 2: found duplicate key"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path, text, problem):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(TrainStage, path)


def test_missing_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(TrainStage, tmp_path / "none.yaml")


def test_file_that_is_not_text_is_a_configuration_error(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(TrainStage, tmp_path / "params.yaml")


def test_configuration_error_is_also_a_value_error():
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, SfgrpoError)


def test_flat_dict_has_dotted_keys_and_json_values(train):
    flat = to_flat_dict(train)
    assert flat["sampling.num_steps"] == 10
    assert flat["update.betas"] == [0.9, 0.999]
    assert json.loads(json.dumps(flat)) == flat
    assert (
        to_flat_dict(load_config(PromptsStage, PARAMS))["prompts.task_weights.counting"]
        == SHIPPED["prompts"]["task_weights"]["counting"]
    )


def test_digest_changes_with_every_value_and_with_nothing_else(train, tmp_path):
    assert config_digest(load(tmp_path, {})) == config_digest(train)
    assert config_digest(load(tmp_path, {"registry.alias": "other"})) == config_digest(train)
    for path, value in {"seed": 1, "update.betas": [0.9, 0.99], "reward.name": "other"}.items():
        assert config_digest(load(tmp_path, {path: value})) != config_digest(train)


def test_digest_is_the_same_in_another_process():
    code = (
        "from pathlib import Path; from sfgrpo.config.stages import *;"
        "print(config_digest(load_config(TrainStage, Path('params.yaml'))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, env=environment)
    assert output.strip() == config_digest(load_config(TrainStage, PARAMS))


def test_batch_arithmetic_of_one_process(train):
    batches = BatchArithmetic(config=train)
    assert (batches.images_per_process, batches.rollout_micro_batches) == (192, 2)
    assert (batches.images_per_optimiser_step, batches.accumulation_steps) == (96, 1)


def test_batch_arithmetic_of_two_processes(tmp_path):
    batches = BatchArithmetic(config=load(tmp_path, {"update.micro_batch_size": 24}), num_processes=2)
    # Micro-batches of 96 are more than the 48 images that one process has of an optimiser step.
    assert (batches.images_per_process, batches.rollout_micro_batch, batches.rollout_micro_batches) == (96, 48, 2)
    assert (batches.images_per_optimiser_step, batches.accumulation_steps) == (48, 2)


def test_a_group_may_span_processes(train):
    assert BatchArithmetic(config=train, num_processes=16).images_per_optimiser_step == 6


def test_processes_that_do_not_divide_the_images_are_refused_with_the_equation(train):
    equation = (
        r"processes \* update\.steps_per_update = 5 \* 2 = 10 does not divide rollout\.prompts_per_update \* "
        r"rollout\.group_size = 8 \* 24 = 192"
    )
    with pytest.raises(ConfigError, match=equation):
        BatchArithmetic(config=train, num_processes=5)


def test_micro_batch_that_does_not_divide_the_share_of_a_process_is_refused_with_the_equation(tmp_path):
    config = load(tmp_path, {"update.micro_batch_size": 32})
    equation = r"update\.micro_batch_size: 32 does not divide .* = 8 \* 24 / 2 / 2 = 48; use 24 or 48"
    with pytest.raises(ConfigError, match=equation):
        BatchArithmetic(config=config, num_processes=2)


def test_estimates_cost_one_pass_per_substep_beyond_the_known_velocity(train, tmp_path):
    # Two substeps: one extra pass for states 0..8, that of state 0 shared by 24 images; none for state 9.
    assert BatchArithmetic(config=train).estimate_passes == pytest.approx(8 + 1 / 24)
    terminal = load(tmp_path, {"advantage.credit": "terminal"})
    assert BatchArithmetic(config=terminal).estimate_passes == 0


def test_explanation_shows_the_whole_equation_and_what_has_no_effect(tmp_path):
    text = BatchArithmetic(config=load(tmp_path, {"advantage.credit": "terminal"})).explain()
    assert "8 x 24 = 192 images" in text
    assert "60 updates x 192 images = 11,520 images" in text
    assert "trains steps 0..8" in text
    assert "no effect   estimates: terminal credit" in text


def test_explanation_lists_scattered_steps_and_guidance(tmp_path):
    config = load(tmp_path, {"update.trained_steps": [0, 2], "sampling.guidance_scale": 4.5, "update.kl_coef": 0.01})
    text = BatchArithmetic(config=config).explain()
    assert "trains steps 0, 2" in text and "twice each for guidance" in text and "no effect" not in text


@pytest.fixture
def no_settings(monkeypatch):
    for field in Environment.model_fields.values():
        monkeypatch.delenv(str(field.validation_alias), raising=False)


def test_environment_has_defaults_that_need_no_server(no_settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "")
    environment = read_environment()
    assert environment.tracking_uri == "sqlite:///mlflow.db"
    assert (environment.scratch_dir, environment.run_id, environment.num_threads) == (Path(".scratch"), None, None)


def test_environment_is_read_from_variables(no_settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("SFGRPO_NUM_THREADS", "3")
    assert (read_environment().tracking_uri, read_environment().num_threads) == ("http://mlflow:5000", 3)


@pytest.mark.parametrize("value", ["AES256", "aws:kms", "aws:kms:alias/a", "aws:kms:arn:aws:kms:eu-west-1:1:key/a"])
def test_encryption_of_s3_is_one_that_s3_knows(no_settings, monkeypatch, value):
    assert read_environment().s3_encryption is None
    monkeypatch.setenv("SFGRPO_S3_ENCRYPTION", value)
    assert read_environment().s3_encryption == value


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SFGRPO_NUM_THREADS", "0", "SFGRPO_NUM_THREADS: '0': .*greater than 0"),
        ("SFGRPO_DEVICE", "gpu", "SFGRPO_DEVICE: 'gpu'"),
        ("SFGRPO_S3_ENCRYPTION", "aes256", "SFGRPO_S3_ENCRYPTION: 'aes256': .*AES256"),
        ("SFGRPO_S3_ENCRYPTION", "aws:kms:", "SFGRPO_S3_ENCRYPTION: 'aws:kms:'"),
        ("SFGRPO_SCRACHT", "x", r"SFGRPO_SCRACHT: unknown key; .*did you mean SFGRPO_SCRATCH\?"),
    ],
)
def test_bad_variable_is_a_configuration_error(no_settings, monkeypatch, name, value, problem):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        read_environment()
