"""The whole pipeline with Prefect, DVC and MLflow on a clone of the repository: killed, resumed, registered once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sfgrpo.checkpoint.state import update_of
from sfgrpo.registry.drawing import PNG_SIGNATURE
from sfgrpo.tracking.mlflow_client import connect
from tests.support.clone import MODEL, NUM_UPDATES, SMALL, TIMEOUT_S, Clone, build_clone, finished
from tests.support.registry import draw
from tests.support.tiny_run import write_params

pytestmark = [
    pytest.mark.slow,
    # Not ours to mend: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
    ),
]


def wait_for_checkpoint(clone: Clone, flow: subprocess.Popen[str], after: int = 0) -> None:
    """Wait until the flow's training has saved more than `after` updates."""
    deadline = time.monotonic() + TIMEOUT_S
    while saved_update(clone) <= after:
        assert flow.poll() is None, finished(flow)
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)


def saved_update(clone: Clone) -> int:
    """Return the update of the newest checkpoint of the newest run, 0 without any."""
    runs = sorted(clone.folder.glob(".scratch/train-*"), key=lambda run: run.stat().st_ctime)
    return max([update_of(path) for path in runs[-1].glob("checkpoints/update-*")], default=0) if runs else 0


def trainers_below(flow: subprocess.Popen[str]) -> list[psutil.Process]:
    """List the processes of the flow's training: the one that DVC started and the ranks that it launched."""
    trainers = []
    for process in psutil.Process(flow.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if [part for part in process.cmdline() if part != "-u"][1:4] == ["-m", "sfgrpo", "train"]:
                trainers.append(process)
    return trainers


def kill_training(clone: Clone, flow: subprocess.Popen[str]) -> None:
    """Wait for the first checkpoint of the flow's training, then kill the process that trains."""
    wait_for_checkpoint(clone, flow)
    (trainer,) = trainers_below(flow)
    trainer.send_signal(signal.SIGKILL)


def ran_stages(output: str) -> list[str]:
    """List the stages that DVC ran."""
    lines = (line.strip() for line in output.splitlines())
    return [line.split("'")[1] for line in lines if line.startswith("Running stage '")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The clone after a flow whose training was killed, and what that flow printed."""

    clone: Clone
    output: str


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    clone = build_clone(tmp_path_factory.mktemp("clone"))
    flow = clone.start("flows.train_policy")
    try:
        kill_training(clone, flow)
    except BaseException:
        flow.terminate()
        raise
    return Line(clone=clone, output=finished(flow))


def test_flow_ends_with_a_registered_version(line):
    assert f"\nmodel version 1 registered: {MODEL}@challenger\n" in line.output
    assert "| last adapter (update " in line.output and "| best adapter (update " in line.output
    assert "reports/evaluate/samples.png" in line.output
    assert (line.clone.folder / ".prefect/prefect.db").exists(), "without a server a flow starts its own"


def test_killed_training_was_resumed_by_the_retry(line):
    log = (line.clone.folder / "logs/train.log").read_text()
    assert "resuming after update " in log
    history = json.loads((line.clone.folder / "reports/train/history.json").read_text())
    assert [metrics["update"] for metrics in history] == list(range(1, NUM_UPDATES + 1))


def test_killed_training_and_its_retry_are_one_run_without_gaps(line):
    record = json.loads((line.clone.folder / "models/policy/training.json").read_text())
    client = connect(line.clone.uri)
    experiment = client.get_experiment_by_name("sfgrpo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (record["mlflow_run_id"], "FINISHED")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "reward/mean")]
    assert sorted(steps) == list(range(1, NUM_UPDATES + 1))


def test_every_evaluation_is_shown_once_although_the_training_was_killed(line):
    evaluations = json.loads((line.clone.folder / "reports/train/evaluations.json").read_text())
    tables = line.clone.shown_evaluations()
    assert len(tables) == len(evaluations) == 1 + NUM_UPDATES // 2
    for number, table in enumerate(tables):
        lines = [line for line in table.splitlines() if line.startswith("|")][2:]
        assert [line.split(" | ")[0] for line in lines] == [f"| {each['update']}" for each in evaluations[: number + 1]]
        assert f"{evaluations[number]['geneval/overall']:.3f} ± " in lines[-1]


def untimed(path: Path) -> list[dict[str, Any]]:
    entries = json.loads(path.read_text())
    return [
        {key: value for key, value in entry.items() if not key.startswith(("time/", "memory/"))} for entry in entries
    ]


def test_background_evaluations_change_no_bit_of_what_is_published(line, tmp_path):
    ignored = shutil.ignore_patterns(".prefect", ".scratch", "cache", "tmp", "policy", "reports", "mlflow.db", "logs")
    shutil.copytree(line.clone.folder, tmp_path, dirs_exist_ok=True, ignore=ignored)
    clone = Clone(folder=tmp_path)
    output = clone.run("flows.train_policy", SFGRPO_EVALUATION_DEVICE="cpu")
    assert f"\nmodel version 1 registered: {MODEL}@challenger\n" in output
    assert (tmp_path / "logs/evaluate-update-0.log").exists()
    assert len(clone.shown_evaluations()) == 1 + NUM_UPDATES // 2
    for name in ("history.json", "evaluations.json"):
        ours, theirs = (untimed(folder / "reports/train" / name) for folder in (tmp_path, line.clone.folder))
        assert ours == theirs
    for pattern in ("models/policy/adapter/*", "reports/train/samples_*.png", "reports/evaluate/*"):
        names = sorted(path.relative_to(tmp_path) for path in tmp_path.glob(pattern))
        assert names
        for name in names:
            assert (tmp_path / name).read_bytes() == (line.clone.folder / name).read_bytes(), name


def test_repro_after_the_flow_runs_nothing_and_status_is_clean(line):
    assert ran_stages(line.clone.run("dvc", "repro")) == []
    assert "Data and pipelines are up to date." in line.clone.run("dvc", "status", "dvc.yaml")


def test_version_is_found_by_name_and_alias_and_draws(line):
    client = connect(line.clone.uri)
    version = client.get_model_version_by_alias(MODEL, "challenger")
    assert int(version.version) == int(client.get_model_version(MODEL, "1").version) == 1
    assert {"git_commit", "prompts_sha256", "geneval/overall"} <= version.tags.keys()
    (image,) = draw(line.clone.uri, f"models:/{MODEL}@challenger", ["a photo of a red circle"], num_inference_steps=2)
    assert image.startswith(PNG_SIGNATURE)


def test_second_flow_trains_nothing_and_registers_no_duplicate(line, prefect_server):
    output = line.clone.run("flows.train_policy", PREFECT_API_URL=prefect_server)
    assert "Running stage" not in output
    assert f"\nmodel version 1 registered: {MODEL}@challenger\n" in output
    assert len(connect(line.clone.uri).search_model_versions(f"name = '{MODEL}'")) == 1


class Started:
    """A flow that is told to stop when it is closed, unless it is done."""

    def __init__(self, clone: Clone, prefect_server: str) -> None:
        self.flow = clone.start("flows.train_policy", PREFECT_API_URL=prefect_server)

    def close(self) -> None:
        if self.flow.poll() is None:
            self.flow.terminate()
            self.flow.communicate(timeout=TIMEOUT_S)


@pytest.mark.distributed
def test_cancelled_flow_leaves_no_rank_and_a_preempted_rank_costs_no_retry(line, tmp_path, prefect_server):
    # A copied store would still name the artifacts of the original, and is refused.
    ignored = shutil.ignore_patterns(".prefect", ".scratch", "mlflow.db*", "mlartifacts")
    shutil.copytree(line.clone.folder, tmp_path, dirs_exist_ok=True, ignore=ignored)
    clone = Clone(folder=tmp_path)
    write_params(tmp_path, {**SMALL, "update.num_updates": 12, "evaluation.every_num_updates": 12})
    params = json.loads((tmp_path / "params.yaml").read_text()) | {"launch": {"num_processes": 2, "max_restarts": 0}}
    (tmp_path / "params.yaml").write_text(json.dumps(params))

    with contextlib.closing(Started(clone, prefect_server)) as cancelled:
        wait_for_checkpoint(clone, cancelled.flow)
        processes = psutil.Process(cancelled.flow.pid).children(recursive=True)
        assert len(trainers_below(cancelled.flow)) == 3
        cancelled.flow.terminate()
        cancelled.flow.communicate(timeout=30)
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive, "Prefect would have killed the flow by now, and left these behind"
    saved = saved_update(clone)
    log = tmp_path / "logs/train.log"
    assert f"its state after update {saved} is saved" in log.read_text()

    with contextlib.closing(Started(clone, prefect_server)) as resumed:
        wait_for_checkpoint(clone, resumed.flow, after=saved)
        rank = next(process for process in trainers_below(resumed.flow) if process.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGUSR1)
        output = finished(resumed.flow)
    assert f" registered: {MODEL}@challenger\n" in output
    assert "Retrying" not in output, "being told to stop used up a retry"
    history = json.loads((tmp_path / "reports/train/history.json").read_text())
    assert [metrics["update"] for metrics in history] == list(range(1, 13))
