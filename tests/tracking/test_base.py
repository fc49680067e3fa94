"""Trackers end as their block does and import MLflow only when used; provenance tags."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfgrpo.errors import Preempted
from sfgrpo.tracking.base import SilentTracker, ending, param_texts
from sfgrpo.tracking.provenance import provenance_tags
from tests.support.recording import RecordingTracker


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (Preempted("told to stop"), "KILLED"),
    ],
    ids=repr,
)
def test_run_ends_as_its_block_does(error, status):
    run = RecordingTracker()
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), ending(run):
        if error:
            raise error
    assert run.status == status


def test_recording_tracker_keeps_every_record(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with ending(RecordingTracker()) as run:
        run.log_params({"a": {"b": 1}})
        run.log_metrics({"x": 1.0}, 3)
        run.log_image(path, "samples", 3)
        run.log_text("| a |", "table.md")
        run.log_prompts(path, "prompts", "evaluation")
        run.set_tags({"k": "v"})
    assert (run.params, run.metrics, run.tags, run.status) == ({"a.b": "1"}, {"x": [(3, 1.0)]}, {"k": "v"}, "FINISHED")
    assert run.images == [("samples", 3, path)]
    assert run.texts == {"table.md": "| a |"}
    assert run.prompts[0][:2] == ("prompts", "evaluation")


def test_silent_tracker_touches_nothing(tmp_path):
    absent = tmp_path / "absent"
    with ending(SilentTracker()) as run:
        run.open()
        run.log_params({"a": 1})
        run.log_metrics({"x": 1.0}, 3)
        run.log_image(absent, "samples", 3)
        run.log_text("| a |", "table.md")
        run.log_prompts(absent, "prompts", "evaluation")
        run.set_tags({"k": "v"})
    assert run.run_id is None


def test_flattening_leaves_dotted_names_alone():
    assert param_texts({"a.b": "text"}) == {"a.b": "text"}


def test_tracking_modules_load_without_mlflow():
    code = "import sys, sfgrpo.tracking.base, sfgrpo.tracking.mlflow_tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def git(folder: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(["git", *arguments], cwd=folder, env=os.environ | identity, check=True, capture_output=True)


def test_provenance_tells_whether_tracked_files_differ_from_the_commit(tmp_path):
    prompts = tmp_path / "train.jsonl"
    for path in (prompts, tmp_path / "dvc.lock", tmp_path / "code.py"):
        path.write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "dvc.lock").write_text("2")
    clean = provenance_tags(tmp_path, prompts)
    (tmp_path / "code.py").write_text("2")
    assert clean["git_dirty"] == "false"
    assert provenance_tags(tmp_path, prompts)["git_dirty"] == "true"
    assert clean.keys() == {"git_commit", "git_dirty", "prompts_sha256", "dvc_lock_sha256"}


def test_provenance_outside_git_is_unknown(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    tags = provenance_tags(tmp_path, tmp_path / "train.jsonl")
    assert (tags["git_commit"], tags["git_dirty"]) == ("unknown", "unknown")
