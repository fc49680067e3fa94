"""Runs in real MLflow stores: every step once, through outages, crashes and lost responses."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from sfgrpo.errors import TrackingError
from sfgrpo.tracking import mlflow_tracker
from sfgrpo.tracking.base import ending
from sfgrpo.tracking.mlflow_client import connect, find_run, is_outage
from sfgrpo.tracking.mlflow_run import MlflowRun
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
from sfgrpo.tracking.provenance import provenance_tags
from tests.support.paths import ROOT
from tests.support.stores import QUIET_MLFLOW

# Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TIMEOUT_S = 60


@dataclasses.dataclass(slots=True, kw_only=True)
class Server:
    """An MLflow server in a process of its own, on a database in a folder."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", self.folder]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1", *store],
                # The server is not the one under test.
                env={name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | QUIET_MLFLOW,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self.answers)

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the module's tests share, because making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    connect(uri).search_experiments()
    return uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(folder=tmp_path_factory.mktemp("server"), port=free_port())
    connect(f"sqlite:///{server.folder}/mlflow.db").search_experiments()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "OPEN_S", 1.0)
    monkeypatch.setattr(mlflow_tracker, "FLUSH_S", dict.fromkeys(mlflow_tracker.FLUSH_S, 1.0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def tracker(uri: str, **options: str) -> MlflowTracker:
    return MlflowTracker(uri=uri, experiment="tests", **options)


def runs(uri: str, **tags: str):
    client = connect(uri)
    experiment = client.get_experiment_by_name("tests")
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return [] if experiment is None else client.search_runs([experiment.experiment_id], wanted)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return steps and values in the order in which they were logged."""
    return [(metric.step, metric.value) for metric in connect(uri).get_metric_history(run_id, key)]


def images(uri: str, run_id: str) -> list[str]:
    return sorted(Path(file.path).name for file in connect(uri).list_artifacts(run_id, "images"))


def ramp(start: int, stop: int) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in range(start, stop)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    return tmp_path / "grid.png"


def test_tracker_that_records_nothing_makes_no_run(uri):
    before = len(runs(uri))
    idle = tracker(uri)
    idle.finish("FINISHED")
    assert idle.run_id is None
    assert len(runs(uri)) == before


def test_pages_show_the_experiment_as_a_training_and_not_as_a_language_model(uri):
    run = tracker(uri)
    run.open()
    client = connect(uri)
    experiment = client.get_experiment(client.get_run(run.run_id).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    run.finish("FINISHED")


def test_parameters_become_dotted_names_and_yaml_values(uri):
    run = tracker(uri)
    run.log_params({"update": {"learning_rate": 1e-3, "trained_steps": None}, "seed": 0, "lora_targets": ["to_q"]})
    run.open()
    assert connect(uri).get_run(run.run_id).data.params == {
        "update.learning_rate": "0.001",
        "update.trained_steps": "null",
        "seed": "0",
        "lora_targets": '["to_q"]',
    }


def test_more_parameters_than_one_request_takes_are_all_logged(uri):
    run = tracker(uri)
    run.log_params({f"p{index}": index for index in range(250)})
    run.open()
    assert len(connect(uri).get_run(run.run_id).data.params) == 250


def test_metrics_keep_their_steps_and_the_times_of_their_calls(uri):
    run = tracker(uri)
    run.open()
    for step in (1, 2):
        run.log_metrics({"reward/mean": step / 10}, step)
        time.sleep(0.05)
    run.open()
    assert history(uri, run.run_id, "reward/mean") == [(1, 0.1), (2, 0.2)]
    first, second = (metric.timestamp for metric in connect(uri).get_metric_history(run.run_id, "reward/mean"))
    assert 45 <= second - first < 5000


def test_replayed_steps_of_a_reopened_run_are_left_out(uri):
    first = tracker(uri, key="replay")
    for step in range(3):
        first.log_metrics({"reward/mean": float(step)}, step)
    first.open()
    again = tracker(uri, key="replay")
    for step in range(1, 5):
        again.log_metrics({"reward/mean": float(step), "late/metric": 0.0}, step)
    again.open()
    assert again.run_id == first.run_id
    assert history(uri, first.run_id, "reward/mean") == ramp(0, 5)
    assert len(history(uri, first.run_id, "late/metric")) == 4


def test_restored_history_asks_about_each_key_once(uri, monkeypatch):
    from mlflow import MlflowClient

    first = tracker(uri, key="cheap")
    for step in range(20):
        first.log_metrics({"a": float(step), "b": float(step)}, step)
    first.open()
    asked = []
    look_up = MlflowClient.get_metric_history
    monkeypatch.setattr(
        MlflowClient, "get_metric_history", lambda client, run, key: asked.append(key) or look_up(client, run, key)
    )
    again = tracker(uri, key="cheap")
    for step in range(30):
        again.log_metrics({"a": float(step), "b": float(step), "c": float(step)}, step)
    again.open()
    assert asked == ["a", "b"]
    assert [history(uri, first.run_id, key) for key in "abc"] == [ramp(0, 30)] * 3


def test_replayed_image_is_left_out(uri, picture):
    for step in (20, 20, 40):
        run = tracker(uri, key="images")
        run.log_image(picture, "samples", 2)
        run.log_image(picture, "samples", step)
        run.open()
    names = images(uri, run.run_id)
    assert [name.split("+timestamp")[0] for name in names if name.endswith(".png")] == [
        f"samples+step+{step}" for step in (2, 20, 40)
    ]
    assert len(names) == 6
    assert run.run_id in [run.info.run_id for run in runs(uri, **{"mlflow.loggedImages": "True"})]


def test_image_without_its_thumbnail_is_completed(uri, picture):
    run = tracker(uri, key="half")
    run.log_image(picture, "samples/noisy", 1)
    run.open()
    (small,) = [name for name in images(uri, run.run_id) if name.endswith(".webp")]
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run.run_id / "artifacts/images"
    before = images(uri, run.run_id)
    (folder / small).unlink()
    again = tracker(uri, key="half")
    again.log_image(picture, "samples/noisy", 1)
    again.open()
    assert images(uri, run.run_id) == before


def test_image_file_may_go_when_the_call_returns(uri, picture):
    run = tracker(uri)
    run.log_image(picture, "samples", 1)
    picture.unlink()
    run.open()
    assert len(images(uri, run.run_id)) == 2


def test_given_run_id_wins_over_the_key(uri):
    named, keyed = tracker(uri), tracker(uri, key="both")
    named.open()
    keyed.open()
    again = tracker(uri, key="both", run_id=named.run_id)
    again.open()
    assert again.run_id == named.run_id != keyed.run_id


def test_unknown_run_id_starts_a_new_run(uri):
    run = tracker(uri, run_id="0" * 32)
    run.open()
    assert run.run_id != "0" * 32


def test_deleted_run_is_not_reopened(uri):
    first = tracker(uri, key="deleted")
    first.open()
    connect(uri).delete_run(first.run_id)
    second = tracker(uri, key="deleted", run_id=first.run_id)
    second.open()
    assert second.run_id != first.run_id
    assert find_run(connect(uri), first.run_id) is None


def test_prompts_are_an_input_with_their_digest(uri, tmp_path):
    path = tmp_path / "train.jsonl"
    # One line end stands inside a text, and one line is blank.
    path.write_bytes('\ufeff{"prompt": "a\u2028"}\r\n\r\n{"prompt": "b"}'.encode())
    run = tracker(uri)
    run.log_prompts(path, "training-prompts", "training")
    run.open()
    (given,) = connect(uri).get_run(run.run_id).inputs.dataset_inputs
    assert given.dataset.name == "training-prompts"
    assert given.dataset.digest == provenance_tags(tmp_path, path)["prompts_sha256"][:16]
    assert given.dataset.profile == '{"num_rows": 2}'
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_text_replaces_an_earlier_one_in_the_folder_beside_the_store(uri):
    run = tracker(uri)
    run.log_text("old", "table.md")
    run.log_text("new", "table.md")
    run.open()
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert (folder / run.run_id / "artifacts" / "table.md").read_text() == "new"


def test_run_of_a_terminated_process_is_killed_not_running(uri):
    code = (
        "import sys, time; from sfgrpo.tracking.mlflow_tracker import MlflowTracker\n"
        "from sfgrpo.tracking.base import ending\n"
        "from sfgrpo.runtime.shutdown import sigterm_as_exit\n"
        "run = MlflowTracker(uri=sys.argv[1], experiment='tests')\n"
        "with sigterm_as_exit(), ending(run):\n"
        "    run.open(); print(run.run_id, flush=True)\n"
        # In short sleeps: one that begins just when the signal arrives is not interrupted.
        "    for _ in range(1200): time.sleep(0.05)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        run_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert connect(uri).get_run(run_id).info.status == "KILLED"


def test_reopened_run_runs_again_until_it_ends(uri):
    first = tracker(uri, key="status")
    with pytest.raises(RuntimeError), ending(first):
        first.set_tags({"a": "b"})
        raise RuntimeError
    assert connect(uri).get_run(first.run_id).info.status == "FAILED"
    again = tracker(uri, key="status")
    again.open()
    assert connect(uri).get_run(first.run_id).info.status == "RUNNING"
    again.finish("FINISHED")
    assert connect(uri).get_run(first.run_id).info.status == "FINISHED"


def test_locked_database_delays_records_and_nothing_else(uri):
    run = tracker(uri)
    run.open()
    other = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    run.log_metrics({"x": 1.0}, 1)
    assert time.monotonic() - started < 0.05
    time.sleep(0.3)
    other.execute("ROLLBACK")
    other.close()
    run.finish("FINISHED")
    assert history(uri, run.run_id, "x") == [(1, 1.0)]


def test_only_an_error_that_may_pass_is_an_outage():
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2 as codes

    locked = MlflowException("(sqlite3.OperationalError) database is locked", codes.TEMPORARILY_UNAVAILABLE)
    unreachable = MlflowException("API request failed")
    overloaded = MlflowException("slow down", codes.REQUEST_LIMIT_EXCEEDED)
    for error in (locked, unreachable, overloaded, ConnectionError(), requests.Timeout(), requests.JSONDecodeError):
        error = error("not JSON", "<html>", 0) if error is requests.JSONDecodeError else error
        assert is_outage(error), error
    response = requests.Response()
    response.status_code = 403
    refused = MlflowException("too long", codes.INVALID_PARAMETER_VALUE)
    for error in (refused, requests.HTTPError(response=response), TypeError(), KeyError()):
        assert not is_outage(error), error


def test_refused_record_is_raised_by_the_next_call(uri):
    run = tracker(uri)
    run.log_params({"seed": 1})
    run.log_params({"seed": 2})
    run.log_metrics({"later": 1.0}, 1)
    with pytest.raises(TrackingError, match=r"refuses to record the run \(.*seed.*; fix that and start the run"):
        run.open()
    run.finish("FAILED")
    assert connect(uri).get_run(run.run_id).info.status == "FAILED"
    assert history(uri, run.run_id, "later") == []


def test_run_whose_last_record_is_refused_does_not_finish(uri):
    run = tracker(uri)
    run.log_params({"seed": 1})
    run.log_params({"seed": 2})
    with pytest.raises(TrackingError, match="refuses to record the run"):
        run.finish("FINISHED")
    assert connect(uri).get_run(run.run_id).info.status == "FAILED"


def test_new_run_without_a_server_says_what_to_do(monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "OPEN_S", 5.0)
    run = tracker(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        TrackingError,
        match=r"MLFLOW_TRACKING_URI http://.* does not answer \(.*refused.*\); start the server there, or unset",
    ):
        run.open()
    started = time.monotonic()
    run.finish("FAILED")
    assert time.monotonic() - started < 0.5


def test_opening_waits_for_a_backlog_that_shrinks(uri, impatient, monkeypatch):
    send = MlflowRun.set_tags
    monkeypatch.setattr(MlflowRun, "set_tags", lambda run, tags: (time.sleep(0.15), send(run, tags)))
    run = tracker(uri)
    for _ in range(10):
        run.set_tags({"a": "b"})
    run.open()
    assert run.run_id is not None


def test_run_that_cannot_be_recorded_ends_with_a_warning_or_does_not_finish(impatient, caplog):
    run = tracker(f"http://127.0.0.1:{free_port()}")
    run.log_metrics({"x": 1.0}, 1)
    wait_until(lambda: "is retried until" in caplog.text)
    for status in ("FAILED", "KILLED"):
        run.finish(status)
        assert "did not take" in caplog.messages[-1]
    with pytest.raises(
        TrackingError, match=r"did not take \d records .* within 1 s .*refused.*start the run again when"
    ):
        run.finish("FINISHED")
    assert run.run_id is None
    assert len([message for message in caplog.messages if "is retried until" in message]) == 1


def test_process_that_leaves_records_behind_exits_all_the_same():
    code = (
        "import sys; from sfgrpo.tracking.mlflow_tracker import MlflowTracker\n"
        "run = MlflowTracker(uri=sys.argv[1], experiment='tests')\n"
        "run.log_metrics({'x': 1.0}, 1)\n"
    )
    command = [sys.executable, "-c", code, f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.slow
def test_lost_responses_lead_to_no_duplicates(server, picture, monkeypatch):
    """Every kind of request succeeds twice while its response is lost."""
    from mlflow import MlflowClient

    lost = []

    def losing(name: str) -> None:
        method = getattr(MlflowClient, name)

        def carried_out(*arguments: object, **options: object) -> object:
            answer = method(*arguments, **options)
            if lost.count(name) < 2:
                lost.append(name)
                raise ConnectionError("the answer was lost")
            return answer

        monkeypatch.setattr(MlflowClient, name, carried_out)

    kinds = ("create_experiment", "create_run", "log_batch", "log_artifact", "log_inputs", "set_tag", "set_terminated")
    for name in kinds:
        losing(name)
    run = MlflowTracker(uri=server.uri, experiment="lossy")
    for step in range(5):
        run.log_metrics({"x": float(step)}, step)
    run.log_image(picture, "samples", 3)
    (picture.parent / "prompts").write_text("{}")
    run.log_prompts(picture.parent / "prompts", "prompts", "training")
    run.finish("FINISHED")
    client = connect(server.uri)
    experiment = client.get_experiment_by_name("lossy")
    (only,) = client.search_runs([experiment.experiment_id])
    assert set(lost) == set(kinds)
    assert history(server.uri, only.info.run_id, "x") == ramp(0, 5)
    assert len(images(server.uri, only.info.run_id)) == 2
    assert len(only.inputs.dataset_inputs) == 1
    assert only.info.status == "FINISHED"


@pytest.mark.slow
def test_server_takes_a_repeated_batch_once(server):
    from mlflow.entities import Metric

    run = tracker(server.uri)
    run.open()
    client = connect(server.uri)
    for _ in range(2):
        client.log_batch(run.run_id, metrics=[Metric("x", 0.5, 1_000, 1), Metric("y", float("nan"), 1_000, 1)])
    client.log_batch(run.run_id, metrics=[Metric("x", 0.5, 1_001, 1)])
    assert [metric.timestamp for metric in client.get_metric_history(run.run_id, "x")] == [1_000, 1_001]
    assert len(client.get_metric_history(run.run_id, "y")) == 1


@pytest.mark.slow
def test_server_that_answers_too_late_records_every_step_once(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = tracker(server.uri)
    run.open()
    os.killpg(server.process.pid, signal.SIGSTOP)
    for step in range(10):
        run.log_metrics({"x": float(step)}, step)
    time.sleep(4)
    os.killpg(server.process.pid, signal.SIGCONT)
    run.finish("FINISHED")
    assert history(server.uri, run.run_id, "x") == ramp(0, 10)


@pytest.mark.slow
def test_history_fills_in_what_a_killed_process_had_not_sent(server):
    code = (
        "import sys, time; from sfgrpo.tracking.mlflow_tracker import MlflowTracker\n"
        "run = MlflowTracker(uri=sys.argv[1], experiment='tests', key='crashed')\n"
        "run.open()\n"
        "for step in range(200): run.log_metrics({'x': float(step), 'y': 0.0}, step)\n"
        "print(run.run_id, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, server.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        run_id = process.stdout.readline().strip()
        wait_until(lambda: history(server.uri, run_id, "x"))
        process.kill()
    assert 0 < len(history(server.uri, run_id, "x")) < 200
    again = tracker(server.uri, key="crashed")
    for step in range(210):
        again.log_metrics({"x": float(step), "y": 0.0}, step)
    again.finish("FINISHED")
    assert again.run_id == run_id
    assert history(server.uri, run_id, "x") == ramp(0, 210)
    assert [step for step, _ in history(server.uri, run_id, "y")] == list(range(210))


@pytest.mark.slow
def test_server_that_is_killed_and_started_again_misses_nothing(server, picture, caplog):
    caplog.set_level(logging.INFO)
    run = tracker(server.uri, key="outage")
    run.open()
    durations_s = []

    def log(start: int, stop: int) -> None:
        for step in range(start, stop):
            started = time.monotonic()
            run.log_metrics({"x": float(step), "y": 0.0}, step)
            if step % 10 == 0:
                run.log_image(picture, "samples", step)
            durations_s.append(time.monotonic() - started)

    log(0, 40)
    wait_until(lambda: history(server.uri, run.run_id, "x"))
    server.kill()
    log(40, 60)
    resumed = tracker(server.uri, key="resumed during the outage")
    resumed.log_metrics({"x": 0.0}, 0)
    wait_until(lambda: "is retried until" in caplog.text)
    assert resumed.run_id is None
    server.start()
    log(60, 70)
    run.finish("FINISHED")
    resumed.finish("FINISHED")
    # Two may be held up by whatever else the machine does.
    assert sorted(durations_s)[-3] < 0.05
    assert history(server.uri, run.run_id, "x") == ramp(0, 70)
    assert [step for step, _ in history(server.uri, run.run_id, "y")] == list(range(70))
    assert len(images(server.uri, run.run_id)) == 2 * 7
    assert history(server.uri, resumed.run_id, "x") == [(0, 0.0)]
    assert connect(server.uri).get_run(run.run_id).info.status == "FINISHED"
    for told in ("is retried until", "works again"):
        assert len([message for message in caplog.messages if told in message]) == 2, "one for each tracker"
