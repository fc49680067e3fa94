"""dvc.yaml agrees with the configuration, the paths and the imports, and DVC repeats what it has to and no more."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo import paths
from sfgrpo.config.stages import STAGES
from tests.support.stub_pipeline import (
    ROOT,
    build_stub_pipeline,
    calls,
    change_param,
    read_definition,
    stub_environment,
)

DEFINED = read_definition()["stages"]

ENTRIES = {
    "prompts": ("sfgrpo.prompts", "sfgrpo.shapes.prompt_sets", "sfgrpo.geneval.prompt_sets"),
    "train": ("sfgrpo.training.trainer", "sfgrpo.policies.sd3", "sfgrpo.rewards"),
    "evaluate": (
        "sfgrpo.evaluation.evaluate",
        "sfgrpo.policies.sd3",
        "sfgrpo.prompts",
        "sfgrpo.rewards",
        "sfgrpo.geneval.table",
        "sfgrpo.tracking.sample_grid",
        "sfgrpo.tracking.image_archive",
    ),
}
"""What `sfgrpo/commands/evaluate.py` calls in each stage."""

BESIDE_THE_RESULT = {
    "train": {
        "errors",
        "files",
        "memory",
        "preemption",
        "progress",
        "report",
        "signals",
        "timing",
        "tracking",
        "validation",
    },
    "evaluate": {"errors", "files"},
}
"""Modules that record, report or check; no number of the stage depends on them."""


def module_path(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Lists the modules of sfgrpo that a file imports when it runs, not merely for its types."""
    tree = ast.parse(path.read_text())
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfgrpo") and id(node) not in for_types:
            yield str(node.module)
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if module_path(name).exists())


def files_behind(stage: str) -> set[str]:
    """Lists the files that shape the stage's result: all that its entry points import, directly or not."""
    waiting, found = list(ENTRIES[stage]), set()
    while waiting:
        path = module_path(waiting.pop())
        if path.stem not in BESIDE_THE_RESULT.get(stage, set()) and path not in found:
            found.add(path)
            waiting += imported_modules(path)
    # The heads of these packages are docstrings; only that of rewards holds code.
    heads = {ROOT / "sfgrpo" / name / "__init__.py" for name in ("", "geneval", "policies", "shapes")}
    return {str(path.relative_to(ROOT)) for path in found - heads}


def listed_files(stage: str) -> set[str]:
    """Lists the code files among the stage's dependencies, folders opened."""
    code = [ROOT / path for path in DEFINED[stage]["deps"] if path.startswith("sfgrpo")]
    files = (file for path in code for file in ([path] if path.suffix else path.glob("*.py")))
    return {str(file.relative_to(ROOT)) for file in files}


def dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    answer = subprocess.run(
        command, cwd=folder, env=stub_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    build_stub_pipeline(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", DEFINED)
def test_params_of_a_stage_are_the_sections_of_its_config(stage):
    assert DEFINED[stage]["params"] == [field.name for field in dataclasses.fields(STAGES[stage])]


def test_every_stage_is_a_dvc_stage_except_those_on_the_registry_and_launch():
    assert set(STAGES) - set(DEFINED) == {"register", "promote", "rollback", "recheck", "launch"}


@pytest.mark.parametrize("stage", DEFINED)
def test_command_of_a_stage_is_its_command_line(stage):
    assert DEFINED[stage]["cmd"] == f"python -m sfgrpo {stage}"


def test_outs_are_the_folders_that_the_stages_write():
    outs = {stage: DEFINED[stage]["outs"] for stage in ("prompts", "train", "evaluate")}
    assert outs == {
        "prompts": [str(paths.PROMPTS)],
        "train": [str(paths.POLICY), str(paths.TRAIN_REPORT)],
        "evaluate": [str(paths.EVALUATE_REPORT)],
    }


def test_only_shipped_models_are_frozen_and_kept_by_git():
    assert [stage for stage in DEFINED if DEFINED[stage].get("frozen")] == ["pretrain", "pretrain_reward"]
    assert DEFINED["pretrain_reward"]["outs"] == [{"models/shapes-clip": {"cache": False}}]
    assert DEFINED["pretrain"]["outs"] == [{"models/shapes-base": {"cache": False}}]


@pytest.mark.parametrize("stage", ENTRIES)
def test_code_that_shapes_a_result_is_a_dependency_and_no_other_is(stage):
    listed = listed_files(stage) - {f"sfgrpo/{name}/__init__.py" for name in ("geneval", "policies", "shapes")}
    door = "sfgrpo/training/run.py" if stage == "train" else "sfgrpo/commands/evaluate.py"
    assert listed == files_behind(stage) | {door, "sfgrpo/factory.py"}


def test_metrics_and_plots_are_files_of_the_reports():
    definition = read_definition()
    plotted = [file for plot in definition["plots"] for settings in plot.values() for file in settings["y"]]
    reports = (str(paths.TRAIN_REPORT), str(paths.EVALUATE_REPORT))
    assert all(str(Path(file).parent) in reports for file in definition["metrics"] + plotted)


def test_dependencies_exist():
    outs = {out for stage in ENTRIES for out in DEFINED[stage]["outs"]} | {"models/shapes-base"}
    missing = [path for stage in DEFINED.values() for path in stage["deps"] if not (ROOT / path).exists()]
    assert not set(missing) - outs


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


def test_edit_of_code_that_only_records_repeats_nothing(pipeline):
    dvc(pipeline, "repro")
    calls(pipeline)
    (pipeline / "sfgrpo/tracking/base.py").write_text("changed = True")
    (pipeline / "sfgrpo/policies/__pycache__").mkdir()
    (pipeline / "sfgrpo/policies/__pycache__/base.pyc").write_text("bytecode")
    dvc(pipeline, "repro")
    assert calls(pipeline) == []


def test_metrics_are_found_where_dvc_yaml_says(pipeline):
    dvc(pipeline, "repro")
    shown = dvc(pipeline, "metrics", "show")
    assert "reports/train/summary.json" in shown
    assert "reports/evaluate/metrics.json" in shown
