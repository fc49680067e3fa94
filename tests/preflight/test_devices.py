"""Devices that a machine does not have are refused by name, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.cli import main
from sfgrpo.errors import ConfigError
from sfgrpo.preflight.devices import check_devices, device_of
from sfgrpo.runtime.environment import read_environment
from tests.support.tiny_run import TINY, inside, write_params


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that pretends a number of GPUs."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)

    return pretend


@pytest.mark.parametrize(
    ("number", "device", "complaint"),
    [
        (0, "cuda", r"SFGRPO_DEVICE: cuda:0 is not there: torch sees no such device"),
        (
            0,
            "cuda:7",
            r"SFGRPO_DEVICE: cuda:7 is not there: torch sees no such device.*; use another device, cpu or auto",
        ),
        (1, "cuda:1", r"SFGRPO_DEVICE: cuda:1 is not there: torch sees one, number 0"),
        (2, "cuda:7", r"SFGRPO_DEVICE: cuda:7 is not there: torch sees 2, numbers 0 to 1"),
        (0, "mps", r"SFGRPO_DEVICE: mps is not there: torch sees no such device"),
    ],
)
def test_absent_device_is_refused(gpus, monkeypatch, number, device, complaint):
    gpus(number)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("SFGRPO_DEVICE", device)
    with pytest.raises(ConfigError, match=complaint):
        device_of(read_environment())


@pytest.mark.parametrize(
    ("number", "device", "rank", "found"),
    [(0, "auto", "0", "cpu"), (0, "cpu", "3", "cpu"), (2, "auto", "1", "cuda:1"), (2, "cuda:1", "0", "cuda:1")],
)
def test_device_that_is_there_is_taken(gpus, monkeypatch, number, device, rank, found):
    gpus(number)
    monkeypatch.setenv("SFGRPO_DEVICE", device)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_of(read_environment()) == found


def test_process_without_a_gpu_of_its_own_is_refused(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("SFGRPO_DEVICE", "auto")
    with pytest.raises(ConfigError, match="cuda:2 is not there: torch sees 2, numbers 0 to 1"):
        device_of(read_environment())


@pytest.mark.parametrize(
    ("evaluation", "complaint"),
    [("cuda:2", "SFGRPO_EVALUATION_DEVICE: cuda:2 is not there"), ("cpu", "cpu is no device of the training's kind")],
)
def test_absent_device_for_evaluations_is_refused(gpus, monkeypatch, evaluation, complaint):
    gpus(2)
    monkeypatch.setenv("SFGRPO_DEVICE", "cuda:0")
    monkeypatch.setenv("SFGRPO_EVALUATION_DEVICE", evaluation)
    with pytest.raises(ConfigError, match=complaint):
        check_devices(read_environment())


@pytest.mark.parametrize("command", ["train", "evaluate", "promote", "recheck"])
def test_commands_refuse_an_absent_device_before_they_start(tmp_path, monkeypatch, capsys, command):
    write_params(tmp_path, {**TINY, "reward.name": "geneval"})
    with inside(tmp_path):
        monkeypatch.setenv("SFGRPO_DEVICE", "cuda:7")
        assert main([command]) == 2
    assert "error: environment: SFGRPO_DEVICE: cuda:7 is not there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
