"""The experiments are what their names say: they load, and rows that are compared differ in one thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sfgrpo.config.loading import read_mapping, read_parameters
from sfgrpo.config.stages import EvaluateStage, PromptsStage, RegisterStage, TrainStage, load_config, to_flat_dict
from sfgrpo.errors import ConfigError
from sfgrpo.study.config import PLANS, ROWS, load_plan, stages_of_run
from tests.support.paths import ROOT

EXPERIMENTS = sorted(path.relative_to(ROOT) for path in (ROOT / "experiments").glob("*/*.yaml"))
PRESETS = tuple(read_mapping(ROOT / PLANS))
BASELINES = [path for path in EXPERIMENTS if path.name.startswith("flow_grpo")]


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def values_of(path: Path) -> dict[str, Any]:
    return {**to_flat_dict(load_config(TrainStage, path)), **to_flat_dict(load_config(PromptsStage, path))}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> set[str]:
    return {key for key in first if first[key] != second[key]}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_experiment_loads_for_every_stage(path: Path) -> None:
    for stage in (PromptsStage, TrainStage, EvaluateStage, RegisterStage):
        load_config(stage, path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_experiment_differs_from_what_it_extends_in_what_it_names_and_in_nothing_else(path: Path) -> None:
    named = read_mapping(path)
    parent = values_of(path.parent / named.pop("extends"))
    # A row may say once more what makes it that row: base models have a guidance, though the parent has the same.
    assert differing(values_of(path), parent) <= set(leaves(named)) <= set(parent)


@pytest.mark.parametrize("path", BASELINES, ids=str)
def test_stepwise_row_differs_from_its_baseline_in_the_credit_alone(path: Path) -> None:
    stepwise = path.with_name(path.name.replace("flow_grpo", "stepwise"))
    assert values_of(path)["advantage.credit"] == "terminal"
    assert differing(values_of(path), values_of(stepwise)) == {"advantage.credit"}


@pytest.mark.parametrize("preset", PRESETS)
def test_pairs_of_the_plan_are_baselines_with_their_stepwise_rows(preset: str) -> None:
    plan = load_plan(preset)
    assert plan.pairs
    for pair in plan.pairs:
        assert pair.stepwise == pair.flow_grpo.replace("flow_grpo", "stepwise")


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_an_ablation_differ_in_one_section(preset: str) -> None:
    for ablation in load_plan(preset).ablations:
        first, *others = [values_of(ROWS / f"{row}.yaml") for row in ablation.rows]
        sections = {key.split(".")[0] for other in others for key in differing(first, other)} - {"advantage"}
        assert len(sections) <= 1, ablation.title


@pytest.mark.parametrize("preset", PRESETS)
def test_runs_of_the_plan_are_the_runs_that_dvc_runs(preset: str) -> None:
    plan = load_plan(preset)
    stages = YAML(typ="safe").load(ROOT / "experiments/dvc.yaml")["stages"]
    matrix = stages[preset]["matrix"]
    assert (set(matrix["row"]), matrix["seed"]) == (set(plan.rows), list(plan.seeds))
    assert stages[preset]["cmd"] == f"python -m sfgrpo study run {preset} ${{item.row}} ${{item.seed}}"


@pytest.mark.parametrize("preset", PRESETS)
def test_runs_of_a_seed_share_prompts_noise_and_length(preset: str) -> None:
    plan = load_plan(preset)
    runs = [stages_of_run(plan, row, plan.seeds[-1]) for row in plan.rows]
    assert len({str(prompts) for prompts, _ in runs}) == 1
    assert {(train.seed, train.update.num_updates) for _, train in runs} == {(plan.seeds[-1], plan.num_updates)}
    assert len({train.rollout for _, train in runs}) == 1


def test_extended_file_gives_what_the_extending_one_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nupdate: {num_updates: 5, betas: [0.9, 0.99]}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/row.yaml").write_text("extends: ../base.yaml\nupdate: {betas: [0.5, 0.5]}\n")
    (tmp_path / "last.yaml").write_text("extends: sub/row.yaml\nseed: 2\n")
    assert read_parameters(tmp_path / "last.yaml") == {"seed": 2, "update": {"num_updates": 5, "betas": [0.5, 0.5]}}


def test_files_that_extend_one_another_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: extends: a\.yaml extends this file in turn; take one"):
        read_parameters(tmp_path / "a.yaml")


def test_extending_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: {}\n")
    with pytest.raises(ConfigError, match=r"extends: \{\} is no file name; write the path of a parameter file"):
        read_parameters(tmp_path / "a.yaml")


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="tiny: unknown key; allowed are short"):
        load_plan("tiny")


def test_run_outside_the_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="short has no row stepwise_unguided_geneval with seed 77"):
        stages_of_run(load_plan("short"), "stepwise_unguided_geneval", 77)
