"""The command line: help, options, and wrong configurations, which are reported before anything heavy loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.cli import COMMANDS, main
from sfgrpo.config.stages import STAGES, TrainStage, load_config
from sfgrpo.runtime.environment import Environment
from tests.support.tiny_run import ROOT, TINY, write_params

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "mlflow", "cv2")
PROBE = f"""
import sys
from sfgrpo.__main__ import main
status = main(sys.argv[1:])
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(loaded.intersection({HEAVY})), sep=",")
sys.exit(status)
"""
"""Run the command line, then list which of the slow libraries it loaded."""

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "misspelt key": (
        "train",
        {"sampling.num_step": 10},
        "sampling.num_step: unknown key; .*did you mean num_steps",
    ),
    "value out of range": ("train", {"rollout.group_size": 1}, "rollout.group_size: 1 is not greater than or equal"),
    "value of another type": ("train", {"update.learning_rate": "1e-3"}, "update.learning_rate: '1e-3' is not"),
    "value that is none of the choices": ("prompts", {"prompts.source": "coco"}, "prompts.source: 'coco' is not"),
    "unknown section": ("evaluate", {"evaluations": {}}, "evaluations: unknown key; .*did you mean evaluation"),
    "sections that do not fit together": (
        "show",
        {**TINY, "rollout.prompts_per_update": 3, "rollout.micro_batch_size": 9},
        "update.steps_per_update: 2 does not divide rollout.prompts_per_update = 3; use 1 or 3",
    ),
}


OPTIONS = {
    "train": ("--params", "--resume", "--accept-code-change"),
    "evaluate-snapshot": (),
    "relocate": (),
    "study": (),
    "promote": ("--params", "--model", "--version", "--judge-only", "--apply"),
    "rollback": ("--params", "--model"),
    "recheck": ("--params", "--model"),
    "sample": ("--model", "--out", "--seed", "--steps", "--guidance"),
    "download": ("--model", "--out"),
    "close-stale-runs": ("--quiet-h", "--report"),
    "retention": ("--days", "--rehearse", "--report"),
}
"""Options of commands that have others than the parameter file."""


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the project on its path and none of our own variables."""
    ours = [str(field.validation_alias) for field in Environment.model_fields.values()]
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_help_names_stages_parameters_environment_and_exit_status(tmp_path):
    shown = run_python("-m", "sfgrpo", "--help", folder=tmp_path)
    assert shown.returncode == 0
    variables = [str(field.validation_alias) for field in Environment.model_fields.values()]
    words = [
        *COMMANDS,
        "params.yaml",
        "dvc repro",
        *variables,
        "Exit status: 0 done, 1 failed, 2 wrong configuration, 75",
    ]
    text = " ".join(shown.stdout.split())
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_values_are_options_of_no_stage_but_which_run_or_version_is_meant_may_be(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert shown == {"--help", *OPTIONS.get(command, ("--params",))}


@pytest.mark.parametrize("command", [name for name in COMMANDS if "-" in name])
def test_underscores_may_be_typed_for_hyphens(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command.replace("-", "_"), "--help"])
    assert f"usage: python -m sfgrpo {command} " in capsys.readouterr().out


def test_former_name_of_a_command_is_refused_with_the_new_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep"])
    assert "error: the command sweep is now close-stale-runs; use that name" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["tarin"], ["train", "--learning-rate", "1"]])
def test_unknown_commands_and_options_are_a_wrong_configuration(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m sfgrpo" in capsys.readouterr().err


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parameters_are_reported_before_anything_loads(tmp_path, case):
    stage, changes, complaint = WRONG[case]
    write_params(tmp_path, changes)
    run = run_python("-c", PROBE, stage, folder=tmp_path)
    assert run.returncode == 2, run.stderr
    assert re.search(f"error: params.yaml: {complaint}", run.stderr), run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == "\n"


def test_absent_parameter_file_is_reported_before_anything_loads(tmp_path):
    run = run_python("-c", PROBE, "train", "--params", "absent.yaml", folder=tmp_path)
    assert run.returncode == 2
    assert "error: absent.yaml: cannot be read (No such file or directory); give the parameter file" in run.stderr
    assert run.stdout == "\n"


def test_all_wrong_parameters_are_reported_at_once(tmp_path, capsys):
    write_params(tmp_path, {"ema.decay": 2.0, "policy.lora_rang": 4, "reward": {}})
    assert main(["train", "--params", str(tmp_path / "params.yaml")]) == 2
    told = capsys.readouterr().err
    assert [path for path in ("ema.decay", "policy.lora_rang", "reward.name") if f": {path}: " not in told] == []


def test_misspelt_variable_is_a_wrong_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFGRPO_DEVISE", "cpu")
    write_params(tmp_path, {})
    assert main(["prompts"]) == 2
    assert "SFGRPO_DEVISE: unknown key; " in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_show_prints_parameters_and_arithmetic(tmp_path, capsys):
    write_params(tmp_path, {**TINY, "update.kl_coef": 0.0})
    assert main(["show", "--params", str(tmp_path / "params.yaml")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^sampling\.num_steps +3$", shown, re.MULTILINE)
    for line in (
        "run         3 updates x 6 images = 18 images on 1 process(es)",
        "rollout     2 x 3 = 6 images; per process 6 = 2 x 3, 3 steps each",
        "update      2 optimiser steps x 3 images per process = 1 x 3; trains steps 0, 1",
        "no effect   update.kl_form: update.kl_coef is 0",
    ):
        assert line in shown


@pytest.mark.parametrize("stage", STAGES)
def test_full_scale_parameters_load(stage):
    config = load_config(stage, ROOT / "params/sd35_medium.yaml")
    if isinstance(config, TrainStage):
        assert (config.rollout.num_images, config.update.clip_range, config.policy.resolution) == (1152, 1e-4, 512)


@pytest.mark.parametrize(
    ("changes", "environment", "complaint"),
    [
        ({"launch.num_processes": 0}, {}, "launch.num_processes: 0 is not greater than 0"),
        ({"launch.num_processes": 5}, {}, r"processes \* update.steps_per_update = 5 \* 2 = 10 does not divide"),
        ({"launch.num_process": 2}, {}, "launch.num_process: unknown key; .*did you mean num_processes"),
        ({"launch.num_nodes": 3}, {}, "launch.num_nodes: 3 nodes need a rendezvous; set PET_RDZV_ENDPOINT to host"),
        ({"launch.num_nodes": 3}, {"PET_NNODES": "2"}, "launch.num_nodes: 3 is not PET_NNODES = '2'; make them agree"),
        ({"launch.num_processes": 3}, {"SFGRPO_GRACE_S": "soon"}, "SFGRPO_GRACE_S: 'soon'"),
    ],
)
def test_wrong_launch_is_reported_before_anything_starts(
    tmp_path, monkeypatch, capsys, changes, environment, complaint
):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_params(tmp_path, {**TINY, **changes})
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert re.search(f"error: .*{complaint}", told), told


def test_more_processes_than_gpus_are_a_wrong_launch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    write_params(tmp_path, {**TINY, "launch.num_processes": 3})
    assert main(["train"]) == 2
    assert "launch.num_processes: 3 is more than the 2 GPUs of this machine; use 1..2" in capsys.readouterr().err
