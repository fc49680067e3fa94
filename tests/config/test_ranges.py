"""Numbers that would overflow, fill the memory or never end are refused with their range."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sfgrpo.cli import main
from sfgrpo.config.stages import STAGES, LaunchStage, RegistryStage, TrainStage, load_config
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import read_environment
from tests.support.paths import ROOT
from tests.support.tiny_run import TINY, write_params


def numbers(kind: type, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of all parameters that are integers."""
    for name, annotation in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(annotation):
            yield from numbers(annotation, f"{path}{name}.")
        elif annotation is int:
            yield path + name


STAGES_WITH_INTEGERS = [stage for stage in STAGES if stage is not RegistryStage]


def test_integers_of_all_stages_are_found():
    assert "rollout.group_size" in numbers(TrainStage) and "launch.num_processes" in numbers(LaunchStage)
    assert all(any(numbers(stage)) for stage in STAGES_WITH_INTEGERS)


@pytest.mark.parametrize("stage", STAGES_WITH_INTEGERS, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("value", [2**64, 10**4000, -(2**63)], ids=["2^64", "huge", "-2^63"])
def test_every_integer_has_a_range_and_says_it(tmp_path, stage, value):
    write_params(tmp_path, dict.fromkeys(numbers(stage), value))
    with pytest.raises(ConfigError) as caught:
        load_config(stage, tmp_path / "params.yaml")
    told = str(caught.value)
    missed = [
        path for path in numbers(stage) if not re.search(rf"{re.escape(path)}: .* is not (less|greater) th", told)
    ]
    assert not missed


def test_largest_seed_is_taken_by_every_generator(tmp_path):
    seed = 2**32 - 1
    write_params(tmp_path, {"seed": seed})
    assert load_config(TrainStage, tmp_path / "params.yaml").seed == seed
    torch.Generator().manual_seed(seed * 1_000_003 + 10**9)
    np.random.default_rng((seed, 1))
    np.random.RandomState(seed)


def test_numbers_that_do_not_divide_are_reported_at_once_however_large(tmp_path):
    write_params(tmp_path, {**TINY, "rollout.prompts_per_update": 999_983, "rollout.group_size": 999_979})
    with pytest.raises(ConfigError, match=r"2 does not divide rollout\.prompts_per_update = 999983; use"):
        load_config(TrainStage, tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sample", "x", "--model", "m", "--seed", str(2**64)], "--seed: '18446744073709551616': Input should be less"),
        (["sample", "x", "--model", "m", "--seed", "-1"], "argument --seed: '-1': Input should be greater than"),
        (["sample", "x", "--model", "m", "--seed", "9" * 5000], "argument --seed: '9999"),
        (["sample", "x", "--model", "m", "--steps", "0"], "argument --steps: '0': Input should be greater than"),
        (
            ["sample", "x", "--model", "m", "--steps", "100000000"],
            "argument --steps: '100000000': Input should be less",
        ),
        (["sample", "x", "--model", "m", "--guidance", "nan"], "argument --guidance: 'nan': Input should be a finite"),
        (["sample", "x", "--model", "m", "--guidance", "-3.5"], "argument --guidance: '-3.5': Input should be greater"),
        (["promote", "--version", "0"], "argument --version: '0': Input should be greater than"),
        (["promote", "--version", str(2**31)], "argument --version: '2147483648': Input should be less than"),
        (["retention", "--days", "nan"], "argument --days: 'nan': Input should be a finite number"),
        (["retention", "--days", "-1"], "argument --days: '-1': Input should be greater than"),
        (["close-stale-runs", "--quiet-h", "inf"], "argument --quiet-h: 'inf': Input should be a finite number"),
        (["evaluate-snapshot", "run", str(2**64)], "argument UPDATE: '18446744073709551616': Input should be less"),
        (["study", "run", "short", "row", str(2**64)], "argument SEED: '18446744073709551616': Input should be less"),
    ],
)
def test_number_of_an_option_out_of_range_is_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SFGRPO_NUM_THREADS", "1000000"),
        ("SFGRPO_NUM_THREADS", str(2**64)),
        ("SFGRPO_TIMEOUT_S", "inf"),
        ("SFGRPO_TIMEOUT_S", "nan"),
        ("SFGRPO_TIMEOUT_S", "1e300"),
        ("SFGRPO_GRACE_S", "1e300"),
        ("SFGRPO_GRACE_S", "-1"),
        ("SFGRPO_DEVICE", "auto:1"),
        ("SFGRPO_DEVICE", "cuda:99999999999"),
        ("SFGRPO_DEVICE", "cuda:-1"),
        ("SFGRPO_EVALUATION_DEVICE", "auto"),
    ],
)
def test_number_of_the_environment_out_of_range_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment: {name}: .*; correct or unset the variable"):
        read_environment()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"seed: {'9' * 5000}", "Exceeds the limit .* for integer string conversion"),
        ("a: &x [*x]", "Circular reference detected"),
        ("? [1, 2]\n: 3", "keys must be str.*; write text as keys"),
        (f"a: {'[' * 1000}{']' * 1000}", "maximum recursion depth exceeded"),
    ],
)
def test_odd_parameter_file_is_a_configuration_error(tmp_path, text, complaint):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"params\.yaml: {complaint}"):
        load_config(TrainStage, path)


def test_shipped_files_are_within_all_ranges():
    for path in (ROOT / "params.yaml", ROOT / "params/sd35_medium.yaml"):
        assert [load_config(stage, path) for stage in STAGES]
