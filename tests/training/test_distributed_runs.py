"""The training command as two processes, on the real thing: told to stop, killed, resumed, taken up from S3."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from sfgrpo.checkpoint.state import TrainingState, latest_checkpoint, load_checkpoint
from sfgrpo.errors import ExitStatus
from tests.support.comparing import assert_same, distance
from tests.support.paths import ROOT
from tests.support.s3 import S3Server
from tests.support.trainings import NUM_LONG_UPDATES, lay_out

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    # Not ours to mend: deprecations between MLflow and SQLAlchemy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

UNSET = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SFGRPO_SCRATCH", "SFGRPO_DEVICE", "SFGRPO_MIRROR")
WAIT_S = 120


class Training:
    """One start of `python -m sfgrpo train`, with everything that it starts."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
        threads = {"OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("a") as log:
            self._begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sfgrpo", "train", *arguments],
                cwd=folder,
                env={**inherited, **threads, **environment},
                stdout=log,
                stderr=log,
            )

    def output(self) -> str:
        """Reads what this start printed."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def wait_for(self, *texts: str) -> None:
        """Waits until one of the texts was printed."""
        deadline = time.monotonic() + WAIT_S
        while not any(text in self.output() for text in texts):
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.output()}"
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """Lists the ranks, in the order of their numbers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [child for child in children if "train" in child.cmdline()]
        return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))

    def ended(self) -> int:
        """Waits for the end; gives the exit status."""
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """Kills the command and whatever it left."""
        family = [*self.ranks(), psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def training(folder: Path, environment: Mapping[str, str] | None = None, *arguments: str) -> Iterator[Training]:
    started = Training(folder, environment or {}, *arguments)
    try:
        yield started
    finally:
        started.kill()


def laid_out(folder: Path, num_processes: int, sharding: str = "none") -> Path:
    lay_out(folder)
    params = json.loads((folder / "params.yaml").read_text())
    params["launch"] = {"num_processes": num_processes, "max_restarts": 3, "sharding": sharding}
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


def end_of(folder: Path) -> TrainingState:
    (run,) = folder.glob(".scratch/train-*")
    return load_checkpoint(latest_checkpoint(run / "checkpoints"))


def recorded_steps(folder: Path) -> dict[str, list[int]]:
    """Lists the steps of every metric of an update, of the only run that there is."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    keys = [key for key in run.data.metrics if not key.startswith(("geneval/", "agreement/", "evaluation", "best/"))]
    keys = [key for key in keys if not key.endswith(("evaluation_s", "evaluation_mb"))]
    return {key: [metric.step for metric in client.get_metric_history(run.info.run_id, key)] for key in keys}


def assert_same_end(folder: Path, expected: Path) -> None:
    """Checks that two runs ended with the same bits, and that MLflow has every update once."""
    ours, theirs = end_of(folder), end_of(expected)
    assert ours.update_index == theirs.update_index == NUM_LONG_UPDATES
    for field in ("adapter", "ema", "best"):
        assert_same(getattr(ours, field), getattr(theirs, field))
    moments = [state.optimizer["state"] for state in (ours, theirs)]
    assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[1])
    for name in ("adapter", "last_adapter"):
        (published,), (wanted,) = ((place / "models/policy" / name).iterdir() for place in (folder, expected))
        assert published.read_bytes() == wanted.read_bytes()
    for ours_of, theirs_of in zip(ours.history, theirs.history, strict=True):
        assert {key: value for key, value in ours_of.items() if not key.startswith(("time/", "memory/"))} == {
            key: value for key, value in theirs_of.items() if not key.startswith(("time/", "memory/"))
        }
    steps = recorded_steps(folder)
    assert "reward/mean" in steps
    assert {key: found for key, found in steps.items() if found != list(range(1, NUM_LONG_UPDATES + 1))} == {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = laid_out(tmp_path_factory.mktemp("undisturbed") / "run", 2)
    with training(folder) as started:
        assert started.ended() == 0, started.output()
    return folder


def test_two_processes_survive_signals_and_kills_and_end_with_the_same_bits(undisturbed, tmp_path):
    folder = laid_out(tmp_path / "run", 2)
    with training(folder) as started:
        started.wait_for("update 3/")
        started.ranks()[1].kill()
        started.wait_for("resuming after update")
        started.wait_for("update 9/", "update 10/", "update 11/")
        started.ranks()[0].send_signal(signal.SIGUSR1)
        assert started.ended() == ExitStatus.RESUMABLE, started.output()
        assert "is saved, and starting it again goes on" in started.output()
    assert not (folder / "models/policy").exists()
    saved = end_of(folder).update_index
    with training(folder) as started:
        started.wait_for(f"update {saved + 3}/")
        started.process.send_signal(signal.SIGTERM)
        assert started.ended() == ExitStatus.RESUMABLE, started.output()
        assert f"update {saved + 1}/" in started.output(), "the saved update was done again"
    saved = end_of(folder).update_index
    with training(folder) as started:
        started.wait_for(f"update {saved + 2}/")
        ranks = started.ranks()
        started.process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive, "ranks outlived their launcher"
    with training(folder) as started:
        assert started.ended() == 0, started.output()
    assert_same_end(folder, undisturbed)


def test_bare_machine_takes_the_run_up_from_s3_by_its_name(undisturbed, tmp_path, s3_server: S3Server):
    folder = laid_out(tmp_path / "first", 2)
    environment = {**s3_server.environment, "SFGRPO_MIRROR": f"s3://runs/{tmp_path.name}"}
    with training(folder, environment) as started:
        started.wait_for("update 8/")
        started.process.send_signal(signal.SIGTERM)
        assert started.ended() == ExitStatus.RESUMABLE, started.output()
    (run,) = folder.glob(".scratch/train-*")
    bare = tmp_path / "second"
    (bare / "data").mkdir(parents=True)
    shutil.copytree(folder / "pipeline", bare / "pipeline")
    # Another seed, which a run that is taken up by its name has to leave alone.
    params = json.loads((folder / "params.yaml").read_text()) | {"seed": 99}
    (bare / "params.yaml").write_text(json.dumps(params))
    with training(bare, environment, "--resume", run.name) as started:
        assert started.ended() == 0, started.output()
        assert f"resuming after update {end_of(folder).update_index}" in started.output()
        assert "update 1/" not in started.output()
    assert_same_end(bare, undisturbed)
    with training(bare, environment, "--resume", "train-0") as started:
        assert started.ended() == ExitStatus.FAILED
        assert f"no run train-0 in s3://runs/{tmp_path.name}; the runs there are {run.name}" in started.output()


def test_another_number_of_processes_goes_on_with_the_same_images(undisturbed, tmp_path):
    folder = laid_out(tmp_path / "run", 2)
    with training(folder) as started:
        started.wait_for("update 5/")
        started.process.send_signal(signal.SIGTERM)
        assert started.ended() == ExitStatus.RESUMABLE, started.output()
    saved = end_of(folder).update_index
    params = json.loads((folder / "params.yaml").read_text()) | {"launch": {"num_processes": 1}}
    (folder / "params.yaml").write_text(json.dumps(params))
    with training(folder) as started:
        assert started.ended() == 0, started.output()
        assert f"resuming after update {saved}" in started.output()
    assert_near_end(folder, undisturbed, first=saved)


def assert_near_end(folder: Path, expected: Path, first: int) -> None:
    """Checks that two runs, which round differently from update `first` on, end near one another."""
    ours, theirs = end_of(folder), end_of(expected)
    # That update sees the same policy still, hence the same images and rewards, bit for bit.
    for key in ("reward/mean", "reward/start", "groups/constant_fraction"):
        assert ours.history[first][key] == theirs.history[first][key], key
    zero = {name: torch.zeros_like(value) for name, value in theirs.adapter.items()}
    assert distance(dict(ours.adapter), dict(theirs.adapter)) < 0.02 * distance(dict(theirs.adapter), zero)


def test_frozen_weights_may_be_sharded(undisturbed, tmp_path):
    folder = laid_out(tmp_path / "run", 2, sharding="full")
    with training(folder) as started:
        assert started.ended() == 0, started.output()
    assert_near_end(folder, undisturbed, first=0)
