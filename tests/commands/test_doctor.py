"""`python -m sfgrpo doctor` finds everything at once, and makes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.commands import doctor
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import read_environment
from tests.support.paths import ROOT
from tests.support.tiny_run import TINY, write_params

BASE = ROOT / "models/shapes-base"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with parameters alone, in which commands work."""
    write_params(tmp_path, {**TINY, "reward.name": "geneval", "policy.pretrained": str(BASE)})
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "SFGRPO_MIRROR", "SFGRPO_DVC_REMOTE", "SFGRPO_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("SFGRPO_DEVICE", "cpu")
    monkeypatch.setattr(doctor, "check_checkout", lambda folder: "commit c0ffee")
    return tmp_path


def findings(text: str) -> dict[str, str]:
    """Return the statuses of the checks by their names."""
    return {line[9:24].strip(): line[:9].strip() for line in text.splitlines() if line[:9].strip()}


def test_all_is_well_with_parameters_and_the_shipped_model_alone(project, capsys):
    assert main(["doctor"]) == 0
    found = findings(capsys.readouterr().out)
    assert set(found) == set(doctor._checks(project, read_environment()))
    # Packages and free memory are those of the machine that runs the tests.
    assert {name for name, status in found.items() if status != "ok"} <= {
        "packages",
        "memory",
        "working disk",
        "state disk",
    }
    assert [path.name for path in project.iterdir()] == ["params.yaml"]


def test_every_problem_is_found_in_one_go_with_exit_status_2(project, capsys, monkeypatch):
    (project / "mlflow.db").write_text("no database")
    changes = {"registry.alias": "v2", "policy.pretrained": "models/flux", "promotion.held_out": {"name": "clip"}}
    write_params(project, {**TINY, "reward.name": "geneval", **changes})
    (project / "data/prompts").mkdir(parents=True)
    for name in ("train", "validation", "evaluation"):
        (project / f"data/prompts/{name}.jsonl").write_text("{")
    (project / "models/policy").mkdir(parents=True)
    for name, value in {
        "SFGRPO_DEVICE": "cuda:7",
        "SFGRPO_SCRATCH": "/proc/scratch",
        "SFGRPO_DVC_REMOTE": "/proc/remote",
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "HTTP_PROXY": "http://proxy:3128",
        "NO_PROXY": "",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    found = findings(shown.out)
    problems = {name for name, status in found.items() if status == "PROBLEM"}
    assert problems == {
        *("parameters", "proxy", "state disk", "locks", "base model", "prompts", "adapter", "Prefect", "DVC remote"),
        *("MLflow", "device"),
    }
    assert f"error: {len(problems)} of {len(found)} checks found a problem; their lines say what to do" in shown.err
    assert found["names"] == "warning" and "not looked at, since parameters are wrong" in shown.out
    assert "registry.alias: 'v2' is a word that MLflow keeps" in shown.out
    assert "SFGRPO_DEVICE: cuda:7 is not there" in shown.out
    assert "mlflow.db is no SQLite database" in shown.out


def test_password_in_an_address_is_not_shown(project, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:1")
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert "http://***@127.0.0.1:1 does not answer" in shown.out
    assert "hunter2" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reward.name": "clip"}, "reward: reward 'clip' needs a model"),
        (
            {"promotion.held_out": {"name": "clip", "pretrained": str(BASE)}},
            "promotion.held_out.pretrained: .*pipeline",
        ),
        ({"policy.resolution": 36}, "policy.resolution 36 is not a multiple of 8"),
    ],
)
def test_models_are_checked_without_being_loaded(project, changes, complaint):
    write_params(project, {**TINY, "reward.name": "geneval", "policy.pretrained": str(BASE), **changes})
    with pytest.raises(ConfigError, match=complaint):
        doctor._check_base_model(Path("params.yaml"))
        doctor._check_reward_models(Path("params.yaml"))
