"""dvc.yaml agrees with the configuration, the paths and the imports, and DVC repeats what it has to and no more."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from sfgrpo import paths
from sfgrpo.config.stages import EvaluateStage, PretrainRewardStage, PretrainStage, PromptsStage, TrainStage
from sfgrpo.training.fingerprint import SHAPING_CODE
from tests.support.stub_pipeline import (
    ROOT,
    build_stub_pipeline,
    calls,
    change_param,
    outputs_of,
    read_definition,
    stub_environment,
)

DEFINED = read_definition()["stages"]


CONFIGS = {
    "pretrain": PretrainStage,
    "pretrain_reward": PretrainRewardStage,
    "prompts": PromptsStage,
    "train": TrainStage,
    "evaluate": EvaluateStage,
}


def dvc(folder: Path, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    answer = subprocess.run(
        command, cwd=folder, env=stub_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert answer.returncode == status, answer.stdout
    return answer.stdout


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    build_stub_pipeline(tmp_path)
    return tmp_path


def test_params_of_a_stage_are_the_sections_of_its_config():
    sections = {stage: [field.name for field in dataclasses.fields(config)] for stage, config in CONFIGS.items()}
    assert {stage: DEFINED[stage]["params"] for stage in DEFINED} == sections


@pytest.mark.parametrize("stage", DEFINED)
def test_command_of_a_stage_is_its_command_line(stage):
    assert DEFINED[stage]["cmd"] == f"python -m sfgrpo {stage}"


def test_outs_are_the_folders_that_the_stages_write():
    outs = {stage: outputs_of(DEFINED[stage]) for stage in ("prompts", "train", "evaluate")}
    assert outs == {
        "prompts": [str(paths.PROMPTS)],
        "train": [str(paths.POLICY), str(paths.TRAIN_REPORT)],
        "evaluate": [str(paths.EVALUATE_REPORT)],
    }


def test_only_shipped_models_are_frozen_and_kept_by_git():
    assert [stage for stage in DEFINED if DEFINED[stage].get("frozen")] == ["pretrain", "pretrain_reward"]
    assert DEFINED["pretrain_reward"]["outs"] == [{"models/shapes-clip": {"cache": False}}]
    assert DEFINED["pretrain"]["outs"] == [{"models/shapes-base": {"cache": False}}]


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_code_dependencies_are_what_the_keys_of_runs_and_evaluations_digest(stage):
    code = [path.removeprefix("sfgrpo/") for path in DEFINED[stage]["deps"] if path.startswith("sfgrpo/")]
    assert code == list(SHAPING_CODE)


def test_metrics_and_plots_are_files_of_the_reports():
    definition = read_definition()
    plotted = [file for plot in definition["plots"] for settings in plot.values() for file in settings["y"]]
    reports = (str(paths.TRAIN_REPORT), str(paths.EVALUATE_REPORT))
    assert all(str(Path(file).parent) in reports for file in definition["metrics"] + plotted)


def test_dependencies_exist():
    made = {str(path) for path in (paths.PROMPTS, paths.POLICY)}
    missing = {path for stage in DEFINED.values() for path in stage["deps"] if not (ROOT / path).exists()}
    assert missing <= made


def test_second_repro_runs_nothing(pipeline):
    dvc(pipeline, "repro")
    assert calls(pipeline) == ["prompts", "train", "evaluate"]
    dvc(pipeline, "repro")
    assert calls(pipeline) == []


def test_changed_training_parameter_repeats_training_and_evaluation_only(pipeline):
    dvc(pipeline, "repro")
    calls(pipeline)
    change_param(pipeline, "update", "learning_rate", 0.5)
    dvc(pipeline, "repro")
    assert calls(pipeline) == ["train", "evaluate"]


def test_parameters_set_back_are_restored_without_training(pipeline):
    shipped = (pipeline / "params.yaml").read_text()
    dvc(pipeline, "repro")
    change_param(pipeline, "update", "learning_rate", 0.5)
    dvc(pipeline, "repro")
    calls(pipeline)
    (pipeline / "params.yaml").write_text(shipped)
    dvc(pipeline, "repro")
    assert calls(pipeline) == []


@pytest.mark.slow
def test_prompts_that_a_person_edited_outlast_dvc(pipeline):
    (pipeline / "real_prompts").touch()
    dvc(pipeline, "repro", "prompts")
    training = pipeline / "data/prompts/train.jsonl"
    edited = training.read_text() + training.read_text().split("\n")[0] + "\n"
    training.write_text(edited)
    refused = dvc(pipeline, "repro", "prompts", status=255)
    assert "data/prompts/train.jsonl: was edited after `python -m sfgrpo prompts`, which would delete it" in refused
    assert "exited with 2" in refused
    assert training.read_text() == edited
    # The cure of the message.
    dvc(pipeline, "commit", "--force", "prompts")
    assert "Stage 'prompts' didn't change, skipping" in dvc(pipeline, "repro", "prompts")
    assert training.read_text() == edited


def test_edit_of_code_that_only_records_leaves_the_pipeline_up_to_date(pipeline):
    dvc(pipeline, "repro")
    (pipeline / "sfgrpo/tracking/base.py").write_text("changed = True")
    (pipeline / "sfgrpo/policies/__pycache__").mkdir()
    (pipeline / "sfgrpo/policies/__pycache__/base.pyc").write_text("bytecode")
    assert "Data and pipelines are up to date" in dvc(pipeline, "status", "dvc.yaml")


def test_edit_of_code_that_shapes_a_result_is_seen(pipeline):
    dvc(pipeline, "repro")
    (pipeline / "sfgrpo/grpo/gains.py").write_text("changed = True")
    assert "sfgrpo/grpo" in dvc(pipeline, "status", "dvc.yaml")


def test_metrics_are_found_where_dvc_yaml_says(pipeline):
    dvc(pipeline, "repro")
    shown = dvc(pipeline, "metrics", "show")
    assert "reports/train/summary.json" in shown
    assert "reports/evaluate/metrics.json" in shown
