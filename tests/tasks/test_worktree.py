"""Worktrees without a server: where data goes, what is shared, which branch is whose."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from dvc.config import Config
from prefect.logging import disable_run_logger

from sfgrpo.errors import ConfigError
from tasks.git import git
from tasks.stages import dvc_repro, push, run_command
from tasks.worktree import Worktree, _environment, _make, run_of_branch, run_worktree, save_branch
from tests.support.s3 import BUCKET, S3Server
from tests.support.stub_pipeline import ROOT, build_stub_pipeline

# Not ours to mend: Prefect's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    build_stub_pipeline(tmp_path / "checkout")
    (tmp_path / "checkout/.dvc/.gitignore").write_text((ROOT / ".dvc/.gitignore").read_text())
    git(tmp_path / "checkout", "add", "--all")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    git(tmp_path / "checkout", *who, "commit", "--quiet", "-m", "First")
    return tmp_path / "checkout"


def planned(checkout: Path, run_id: str = "0123456789", name: str = "calm-owl", remote: str | None = None) -> Worktree:
    return Worktree(
        checkout=checkout,
        folder=checkout / ".worktrees" / run_id,
        run_id=run_id,
        run_name=name,
        commit=git(checkout, "rev-parse", "HEAD"),
        dvc_remote=remote,
    )


def test_a_run_in_place_has_no_worktree_and_takes_no_parameters():
    with run_worktree({}) as none:
        assert none is None
    with (
        pytest.raises(
            ConfigError, match=r"parameters seed were given to a run that works in place; write them to params"
        ),
        run_worktree({"seed": 1}),
    ):
        pass


@pytest.mark.slow
def test_data_goes_to_the_bucket_and_no_secret_to_any_file(checkout, s3_server: S3Server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    here = planned(checkout, remote=f"s3://{BUCKET}/dvc/store")
    _make(here)
    _make(here)
    monkeypatch.chdir(here.folder)
    with disable_run_logger():
        run_command("prompts", dvc_repro("prompts"))
        push.fn(("prompts",))
    listed = s3_server.client().list_objects_v2(Bucket=BUCKET, Prefix="dvc/store/")
    assert listed["KeyCount"] == 2
    assert (checkout / ".dvc/cache/files").exists() and not (here.folder / ".dvc/cache").exists()
    found = subprocess.run(["grep", "-rl", s3_server.secret_key, checkout], capture_output=True, text=True)
    assert found.stdout == ""


def test_interrupted_making_is_done_again(checkout):
    here = planned(checkout)
    _make(here)
    (here.folder / ".dvc/config.local").unlink()
    (here.folder / "half").touch()
    _make(here)
    assert not (here.folder / "half").exists()


def test_relative_places_are_those_of_the_checkout(checkout, monkeypatch):
    for name in ("SFGRPO_SCRATCH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    assert _environment(checkout) == {
        "SFGRPO_SCRATCH": str(checkout / ".scratch"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{checkout / 'mlflow.db'}",
    }
    monkeypatch.setenv("SFGRPO_SCRATCH", "/scratch")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert _environment(checkout) == {"SFGRPO_SCRATCH": "/scratch"}
    assert os.environ["SFGRPO_SCRATCH"] == "/scratch"


def test_branch_moves_with_its_run_and_is_not_taken_by_another_of_the_same_name(checkout):
    first, second = planned(checkout, "11111111-1"), planned(checkout, "22222222-2")
    for here in (first, second):
        here.folder.mkdir(parents=True)
        (here.folder / "dvc.lock").write_text(f"lock of {here.run_id}\n")
    assert save_branch(first) == save_branch(first) == "runs/calm-owl"
    assert save_branch(second) == save_branch(second) == "runs/calm-owl-22222222"
    assert run_of_branch(checkout, "runs/calm-owl") == "11111111-1"
    assert git(checkout, "show", "runs/calm-owl-22222222:dvc.lock") == "lock of 22222222-2"
    assert run_of_branch(checkout, "runs/none") is None


def test_branch_of_a_person_is_left_alone(checkout):
    git(checkout, "branch", "runs/calm-owl")
    here = planned(checkout)
    here.folder.mkdir(parents=True)
    (here.folder / "dvc.lock").write_text("lock\n")
    assert save_branch(here) == "runs/calm-owl-01234567"
    assert git(checkout, "rev-parse", "runs/calm-owl") == here.commit


@pytest.mark.parametrize(
    ("encryption", "remote", "found"),
    [
        ("AES256", "s3://bucket/store", {"sse": "AES256"}),
        ("aws:kms", "s3://bucket/store", {"sse": "aws:kms"}),
        ("aws:kms:key-1", "s3://bucket/store", {"sse_kms_key_id": "key-1", "sse": "aws:kms"}),
        ("AES256", "/folder", {}),
    ],
)
def test_data_in_the_bucket_is_encrypted_as_all_else_is(checkout, monkeypatch, encryption, remote, found):
    monkeypatch.setenv("SFGRPO_S3_ENCRYPTION", encryption)
    _make(planned(checkout, remote=remote))
    settings = Config(dvc_dir=str(checkout / ".worktrees/0123456789/.dvc"))
    assert {name: settings["remote"]["store"][name] for name in found} == found
    assert ("sse" in settings["remote"]["store"]) == ("sse" in found)
    assert (settings["core"]["remote"], settings["cache"]["dir"]) == ("store", str(checkout / ".dvc/cache"))


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("Tuesday's run: no. 2", "runs/Tuesday-s-run-no-2"),
        ("..", "runs/0123"),
        ("x" * 300, f"runs/{'x' * 100}"),
        ("ä" * 300 + "x", "runs/x"),
        ("a\n\nPrefect-Flow-Run: other", "runs/a-Prefect-Flow-Run-other"),
        ("kreis.lock", "runs/kreis-lock"),
    ],
)
def test_any_name_of_a_run_makes_a_branch(checkout, name, branch):
    here = planned(checkout, "0123", name)
    here.folder.mkdir(parents=True)
    (here.folder / "dvc.lock").write_text("lock\n")
    assert save_branch(here) == branch
