"""A run and the code: which edits leave it resumable, which do not, and how it goes on with other code all the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sfgrpo.cli import main
from sfgrpo.rewards import REWARDS
from sfgrpo.training import fingerprint
from tests.support.tiny_run import TINY, build_tiny_project, failing, inside, read_history, write_params

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TIMEOUT_S = 300


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training that died after its first update; its reward is one that every process knows."""
    folder = tmp_path_factory.mktemp("interrupted")
    build_tiny_project(folder)
    write_params(folder, TINY | {"reward.name": "geneval"})
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        # Named as the reward that goes on, since its evaluations are compared with later ones.
        patch.setitem(REWARDS, "geneval", type("Failing", (failing("raise"),), {"name": "geneval"}))
        assert main(["train"]) == 1
    return folder


@pytest.fixture
def project(interrupted: Path, tmp_path: Path) -> Iterator[Path]:
    """The working directory becomes a copy of the interrupted training's."""
    folder = shutil.copytree(interrupted, tmp_path / "project")
    with inside(folder):
        yield folder


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, which the fingerprints digest and `python -m sfgrpo` runs from now on."""
    copied = shutil.copytree(fingerprint.PACKAGE, tmp_path / "sfgrpo", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "PACKAGE", copied)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return copied


def edit(module: Path, line: str = "# An edit.") -> None:
    module.write_text(f"{module.read_text()}{line}\n")


def the_run() -> Path:
    (run,) = Path(".scratch").glob("train-*")
    return run


def train(*arguments: str) -> str:
    """Run `python -m sfgrpo train`; return what it prints and logs, once it has succeeded."""
    done = subprocess.run(
        [sys.executable, "-m", "sfgrpo", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    assert [metrics["update"] for metrics in read_history(Path())] == [1, 2, 3]
    return done.stdout


@pytest.mark.slow
def test_edit_of_code_that_only_records_leaves_an_unfinished_training_resumable(code, project):
    run = the_run()
    for folder in ("promotion", "storage", "registry", "commands", "study", "runtime"):
        edit(next((code / folder).glob("[a-z]*.py")))
    edit(code / "tracking/mlflow_tracker.py", "print('the edited tracker')")
    output = train()
    assert "the edited tracker" in output
    assert "resuming after update 1" in output
    assert the_run() == run


@pytest.mark.slow
def test_run_of_other_code_goes_on_only_where_that_is_accepted(code, project, capsys):
    run = the_run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    old_code = json.loads((run / "inputs/fingerprint.json").read_text())["code"]
    edit(code / "grpo/sde.py")
    assert main(["train", "--resume", run.name]) == 2
    refusal = capsys.readouterr().err
    assert f"run {run.name} was started with other code, and would not be the same run; check out commit" in refusal
    assert "go on with today's code by --accept-code-change" in refusal

    output = train("--resume", run.name, "--accept-code-change")
    assert "resuming after update 1" in output
    assert f"the run goes on from {run.name} with other code: {old_code[:16]} -> " in output
    # The old run is as it was, and the new one has its history.
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (successor,) = set(Path(".scratch").glob("train-*")) - {run}
    # Absolute: MLflow keeps one connection per address, and this process had working directories before.
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (recorded,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert recorded.data.tags["sfgrpo.code_change"].startswith(f"{old_code[:16]} -> ")
    assert [point.step for point in client.get_metric_history(recorded.info.run_id, "reward/mean")] == [1, 2, 3]

    # From now on it is a run like any other.
    assert main(["train", "--resume", successor.name]) == 0
    assert set(Path(".scratch").glob("train-*")) == {run, successor}


def test_other_parameters_are_refused_whatever_is_accepted(code, project, capsys):
    run = the_run()
    params = run / "inputs/params.yaml"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"seed": 7}))
    edit(code / "grpo/sde.py")
    assert main(["train", "--resume", run.name, "--accept-code-change"]) == 2
    refusal = capsys.readouterr().err
    assert "was started with other parameters and code, and would not be the same run" in refusal
    assert "--accept-code-change" not in refusal.split("error: ")[1]


def test_accepting_a_change_needs_a_run(project, capsys):
    assert main(["train", "--accept-code-change"]) == 2
    assert "--accept-code-change is about a run that is resumed; name it by --resume RUN" in capsys.readouterr().err
