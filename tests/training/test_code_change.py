"""A run and the code: which edits leave it resumable, which do not, and how it goes on with other code all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.training import fingerprint
from tests.support.recording import RecordingTracker
from tests.support.tiny_run import RECORD, build_tiny_project, failing, inside, numbers_of

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training that died after its first update."""
    folder = tmp_path_factory.mktemp("interrupted")
    build_tiny_project(folder)
    with inside(folder, failing("raise")):
        assert main(["train"]) == 1
    return folder


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, which the fingerprints digest from now on."""
    copied = shutil.copytree(fingerprint.PACKAGE, tmp_path / "sfgrpo", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "PACKAGE", copied)
    return copied


@pytest.fixture
def tracker(interrupted: Path, tmp_path: Path) -> Iterator[RecordingTracker]:
    """The working directory becomes a copy of the interrupted training's."""
    with inside(shutil.copytree(interrupted, tmp_path / "project")) as tracker:
        yield tracker


def edit(module: Path) -> None:
    module.write_text(module.read_text() + "# An edit.\n")


def the_run() -> Path:
    (run,) = Path(".scratch").glob("train-*")
    return run


def assert_recorded_numbers() -> None:
    for found, expected in zip(numbers_of(Path()), json.loads(RECORD.read_text()), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_edit_of_code_that_only_records_leaves_an_unfinished_training_resumable(code, tracker, caplog):
    caplog.set_level("INFO")
    run = the_run()
    for folder in ("tracking", "promotion", "storage", "registry", "commands", "study", "runtime"):
        edit(next((code / folder).glob("[a-z]*.py")))
    assert main(["train"]) == 0
    assert "resuming after update 1" in caplog.text
    assert the_run() == run
    assert_recorded_numbers()


def test_run_of_other_code_goes_on_only_where_that_is_accepted(code, tracker, caplog, capsys):
    caplog.set_level("INFO")
    run = the_run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    old_code = json.loads((run / "inputs/fingerprint.json").read_text())["code"]
    edit(code / "grpo/sde.py")
    assert main(["train", "--resume", run.name]) == 2
    refusal = capsys.readouterr().err
    assert f"run {run.name} was started with other code, and would not be the same run; check out commit" in refusal
    assert "go on with today's code by --accept-code-change" in refusal

    assert main(["train", "--resume", run.name, "--accept-code-change"]) == 0
    assert "resuming after update 1" in caplog.text
    assert f"the run goes on from {run.name} with other code: {old_code[:16]} -> " in caplog.text
    assert tracker.tags["sfgrpo.code_change"].startswith(f"{old_code[:16]} -> ")
    # The old run is as it was, and the new one has its history.
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (successor,) = set(Path(".scratch").glob("train-*")) - {run}
    assert_recorded_numbers()
    assert [step for step, _ in tracker.metrics["reward/mean"]] == [1, 2, 3]

    # From now on it is a run like any other.
    assert main(["train", "--resume", successor.name]) == 0
    assert set(Path(".scratch").glob("train-*")) == {run, successor}


def test_other_parameters_are_refused_whatever_is_accepted(code, tracker, capsys):
    run = the_run()
    params = run / "inputs/params.yaml"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"seed": 7}))
    edit(code / "grpo/sde.py")
    assert main(["train", "--resume", run.name, "--accept-code-change"]) == 2
    refusal = capsys.readouterr().err
    assert "was started with other parameters and code, and would not be the same run" in refusal
    assert "--accept-code-change" not in refusal.split("error: ")[1]


def test_accepting_a_change_needs_a_run(tracker, capsys):
    assert main(["train", "--accept-code-change"]) == 2
    assert "--accept-code-change is about a run that is resumed; name it by --resume RUN" in capsys.readouterr().err
