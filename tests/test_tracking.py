"""Runs in a real MLflow store: made lazily, reopened without doubles, ended truthfully."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sfgrpo.provenance import provenance_tags
from sfgrpo.tracking import MlflowTracker, RecordingTracker, connect, ending, find_run, flatten

# Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the module's tests share, because making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def tracker(uri: str, **options: str) -> MlflowTracker:
    return MlflowTracker(uri=uri, experiment="tests", **options)


def runs(uri: str, **tags: str):
    client = connect(uri)
    experiment = client.get_experiment_by_name("tests")
    wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    return [] if experiment is None else client.search_runs([experiment.experiment_id], wanted)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in connect(uri).get_metric_history(run_id, key)]


def test_tracker_that_records_nothing_makes_no_run(uri):
    before = len(runs(uri))
    idle = tracker(uri)
    idle.finish("FINISHED")
    assert idle.run_id is None
    assert len(runs(uri)) == before


def test_parameters_become_dotted_names_and_yaml_values(uri):
    run = tracker(uri)
    run.log_params({"update": {"learning_rate": 1e-3, "trained_steps": None}, "seed": 0, "lora_targets": ["to_q"]})
    assert connect(uri).get_run(run.run_id).data.params == {
        "update.learning_rate": "0.001",
        "update.trained_steps": "null",
        "seed": "0",
        "lora_targets": '["to_q"]',
    }


def test_more_parameters_than_one_request_takes_are_all_logged(uri):
    run = tracker(uri)
    run.log_params({f"p{index}": index for index in range(250)})
    assert len(connect(uri).get_run(run.run_id).data.params) == 250


def test_metrics_keep_their_steps(uri):
    run = tracker(uri)
    run.log_metrics({"reward/mean": 0.1}, 1)
    run.log_metrics({"reward/mean": 0.2}, 2)
    assert history(uri, run.run_id, "reward/mean") == [(1, 0.1), (2, 0.2)]


def test_replayed_steps_of_a_reopened_run_are_left_out(uri):
    first = tracker(uri, key="replay")
    for step in range(3):
        first.log_metrics({"reward/mean": float(step)}, step)
    again = tracker(uri, key="replay")
    for step in range(1, 5):
        again.log_metrics({"reward/mean": float(step), "late/metric": 0.0}, step)
    assert again.run_id == first.run_id
    assert history(uri, first.run_id, "reward/mean") == [(step, float(step)) for step in range(5)]
    assert len(history(uri, first.run_id, "late/metric")) == 4


def test_replayed_image_is_left_out(uri, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    for _ in range(2):
        run = tracker(uri, key="images")
        run.log_image(tmp_path / "grid.png", "samples", 20)
    files = [file.path for file in connect(uri).list_artifacts(run.run_id, "images")]
    assert len([file for file in files if file.endswith(".png")]) == 1


def test_given_run_id_wins_over_the_key(uri):
    named, keyed = tracker(uri), tracker(uri, key="both")
    for run in (named, keyed):
        run.set_tags({"made": "yes"})
    again = tracker(uri, key="both", run_id=named.run_id)
    again.set_tags({"reopened": "yes"})
    assert again.run_id == named.run_id != keyed.run_id


def test_unknown_run_id_starts_a_new_run(uri):
    run = tracker(uri, run_id="0" * 32)
    run.set_tags({"a": "b"})
    assert run.run_id != "0" * 32


def test_deleted_run_is_not_reopened(uri):
    first = tracker(uri, key="deleted")
    first.set_tags({"a": "b"})
    connect(uri).delete_run(first.run_id)
    second = tracker(uri, key="deleted", run_id=first.run_id)
    second.set_tags({"a": "b"})
    assert second.run_id != first.run_id
    assert find_run(connect(uri), first.run_id) is None


def test_prompts_are_an_input_with_their_digest(uri, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    run = tracker(uri)
    run.log_prompts(path, "training-prompts", "training")
    (given,) = connect(uri).get_run(run.run_id).inputs.dataset_inputs
    assert given.dataset.name == "training-prompts"
    assert given.dataset.digest == provenance_tags(tmp_path, path)["prompts_sha256"][:16]
    assert given.dataset.profile == '{"num_rows": 2}'
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_text_replaces_an_earlier_one_in_the_folder_beside_the_store(uri):
    run = tracker(uri)
    run.log_text("old", "table.md")
    run.log_text("new", "table.md")
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert (folder / run.run_id / "artifacts" / "table.md").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_run_ends_as_its_block_does(uri, error, status):
    run = tracker(uri)
    with pytest.raises(error) if error else contextlib.nullcontext(), ending(run):
        run.set_tags({"a": "b"})
        if error:
            raise error
    assert connect(uri).get_run(run.run_id).info.status == status


def test_run_of_a_terminated_process_is_killed_not_running(uri):
    code = (
        "import sys, time; from sfgrpo.tracking import MlflowTracker, ending\n"
        "run = MlflowTracker(uri=sys.argv[1], experiment='tests')\n"
        "with ending(run):\n"
        "    run.set_tags({'a': 'b'}); print(run.run_id, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True) as process:
        run_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert connect(uri).get_run(run_id).info.status == "KILLED"


def test_reopened_run_runs_again_until_it_ends(uri):
    first = tracker(uri, key="status")
    with pytest.raises(RuntimeError), ending(first):
        first.set_tags({"a": "b"})
        raise RuntimeError
    again = tracker(uri, key="status")
    again.set_tags({"a": "b"})
    assert connect(uri).get_run(first.run_id).info.status == "RUNNING"
    again.finish("FINISHED")
    assert connect(uri).get_run(first.run_id).info.status == "FINISHED"


def test_recording_tracker_keeps_everything_in_plain_sight(tmp_path):
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


def test_flattening_leaves_dotted_names_alone():
    assert flatten({"a.b": "text"}) == {"a.b": "text"}


def test_tracking_module_loads_without_mlflow():
    code = "import sys, sfgrpo.tracking; sys.exit('mlflow' in sys.modules)"
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
