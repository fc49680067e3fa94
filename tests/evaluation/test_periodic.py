"""Background evaluations of a training: whoever does them, and whatever dies, the training ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfgrpo.checkpoint.snapshots import (
    evaluation_key,
    list_snapshots,
    prune_snapshots,
    publish_snapshot,
    read_snapshot,
    snapshot_path,
)
from sfgrpo.checkpoint.state import latest_checkpoint, load_checkpoint
from sfgrpo.cli import main
from sfgrpo.errors import IntegrityError, Preempted
from sfgrpo.evaluation.store import claimed_evaluation, read_metrics
from sfgrpo.policies.base import use_adapter
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.training.trainer import Trainer
from tests.support.comparing import assert_same
from tests.support.paths import ROOT
from tests.support.recording import RecordingTracker
from tests.support.tiny import Light, disturb, make_tiny_policy
from tests.support.tiny_run import build_tiny_project, inside
from tests.support.trainings import EVALUATION, Stopping, adapter_of, make_evaluator, small_config, timeless, trainer_in

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DUE = [0, 2, 4, 5]


class Bright(Light):
    """Finds images right by a digit of their lightness, which any change of them changes, and counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, images, prompts):
        self.num_calls += 1
        return (super().__call__(images, prompts) * 20_000 % 2 > 1).float()


class Hooked(RecordingTracker):
    """Does something when a training update is recorded, with its number."""

    def __init__(self, hook: Callable[[int], None]) -> None:
        super().__init__()
        self.hook = hook

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        if "reward/mean" in metrics:
            self.hook(step)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What a training has come to."""

    trainer: Trainer
    tracker: RecordingTracker
    is_correct: Bright
    folder: Path


def trained(folder: Path, *, tracker: RecordingTracker | None = None, **changes: Any) -> End:
    tracker, is_correct = tracker or RecordingTracker(), Bright()
    trainer = trainer_in(
        folder / "run", tracker=tracker, is_correct=is_correct, store=folder / "evaluations", **changes
    )
    trainer.run()
    return End(trainer=trainer, tracker=tracker, is_correct=is_correct, folder=folder / "run")


def evaluate_as_another_process(folder: Path, update: int) -> None:
    """Evaluates a snapshot as another process would, with a policy of its own."""
    (snapshot,) = [each for each in list_snapshots(folder / "run") if each.update == update]
    policy = make_tiny_policy(seed=7)
    evaluator = make_evaluator(small_config(), Bright())
    with claimed_evaluation(folder / "evaluations", snapshot.key) as is_free:
        assert is_free
        with use_adapter(policy, read_snapshot(folder / "run", update)):
            evaluator.evaluate(policy, folder / "evaluations", snapshot.key)


def assert_same_end(ours: End, theirs: End) -> None:
    states = [load_checkpoint(latest_checkpoint(end.folder / "checkpoints")) for end in (ours, theirs)]
    for field in ("update_index", "adapter", "ema", "optimizer", "best", "rng"):
        assert_same(getattr(states[0], field), getattr(states[1], field))
    assert timeless(ours.trainer.history) == timeless(theirs.trainer.history)
    assert timeless(ours.trainer.evaluations) == timeless(theirs.trainer.evaluations)
    assert timeless([ours.trainer.best]) == timeless([theirs.trainer.best])
    for place in ("best/*", "samples_*.png"):
        files = [{path.name: path.read_bytes() for path in end.folder.glob(place)} for end in (ours, theirs)]
        assert files[0] == files[1] and files[0]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> End:
    """A training that evaluates by itself."""
    end = trained(tmp_path_factory.mktemp("inline"))
    assert len({result["metrics"]["geneval/overall"] for result in end.trainer.evaluations}) > 1
    return end


def test_training_without_a_background_evaluator_evaluates_at_its_end_by_itself(inline, tmp_path):
    def num_evaluated() -> int:
        return len(list((tmp_path / "evaluations").glob("*/metrics.json")))

    counts: list[int] = []
    end = trained(tmp_path, tracker=Hooked(lambda update: counts.append(num_evaluated())), in_background=True)
    assert counts == [0] * 5 and num_evaluated() == len(DUE)
    assert_same_end(end, inline)
    assert [step for step, _ in end.tracker.metrics["geneval/overall"]] == DUE
    assert [step for _, step, _ in end.tracker.images] == DUE


def test_background_results_are_taken_between_updates_in_their_order(inline, tmp_path):
    recorded: list[list[int]] = []

    def hook(update: int) -> None:
        recorded.append([step for step, _ in tracker.metrics.get("geneval/overall", [])])
        if update == 3:
            evaluate_as_another_process(tmp_path, 2)
        if update == 4:
            evaluate_as_another_process(tmp_path, 0)

    tracker = Hooked(hook)
    end = trained(tmp_path, tracker=tracker, in_background=True)
    assert recorded == [[], [], [], [], [0, 2]]
    assert end.is_correct.num_calls == 2
    assert_same_end(end, inline)


@pytest.mark.parametrize("stopped_at", [1, 3, 4])
@pytest.mark.parametrize("in_background_again", [True, False])
def test_stopped_training_takes_up_what_was_pending(inline, tmp_path, stopped_at, in_background_again):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tracker=Stopping(stopped_at), in_background=True)
    if stopped_at == 3:
        evaluate_as_another_process(tmp_path, 2)
    assert_same_end(trained(tmp_path, in_background=in_background_again), inline)


def test_evaluation_that_was_done_before_the_stop_is_not_done_again(inline, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tracker=Stopping(2))
    end = trained(tmp_path)
    assert end.trainer.evaluations[0]["metrics"]["time/evaluation_s"] > 0
    assert end.is_correct.num_calls == len(DUE) - 1
    assert_same_end(end, inline)


def test_other_training_shares_the_evaluation_of_the_untrained_adapter(inline, tmp_path):
    shutil.copytree(inline.folder.parent / "evaluations", tmp_path / "evaluations")
    config = small_config(update={"num_updates": 1, "learning_rate": 3e-2})
    end = trained(tmp_path, config=config)
    assert end.is_correct.num_calls == 1
    assert end.trainer.evaluations[0] == inline.trainer.evaluations[0]


def test_end_waits_for_a_living_process_and_not_for_a_dead_one(inline, tmp_path):
    code = "import pathlib, sys, time\nfrom sfgrpo.evaluation.store import claimed_evaluation\n"
    code += (
        "with claimed_evaluation(pathlib.Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); time.sleep(120)"
    )
    holders: list[subprocess.Popen] = []

    def hook(update: int) -> None:
        if update == 5:
            snapshot = list_snapshots(tmp_path / "run")[1]
            command = [sys.executable, "-c", code, str(tmp_path / "evaluations"), snapshot.key]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            holders.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            assert holders[0].stdout.readline() == "held\n"
            threading.Timer(6.0, holders[0].kill).start()

    begin = time.monotonic()
    end = trained(tmp_path, tracker=Hooked(hook), in_background=True)
    assert time.monotonic() - begin > 5.0 and holders[0].wait() == -signal.SIGKILL
    holders[0].stdout.close()
    assert_same_end(end, inline)


class ToldAtTheEnd(GracefulShutdown):
    """Is told to stop once something is the case."""

    def __init__(self, is_told: Callable[[], bool]) -> None:
        super().__init__(grace_s=60.0)
        self.is_told = is_told

    @property
    def stop_requested(self) -> bool:
        return self.is_told()

    @property
    def remaining_s(self) -> float:
        return 60.0 if self.stop_requested else float("inf")


def test_training_that_waits_at_its_end_can_be_told_to_stop(inline, tmp_path):
    waiting: list[int] = []
    tracker = Hooked(waiting.append)

    def hold(update: int) -> None:
        waiting.append(update)
        if update == 5:
            stack.append(claimed_evaluation(tmp_path / "evaluations", list_snapshots(tmp_path / "run")[0].key))
            assert stack[0].__enter__()

    stack: list[Any] = []
    tracker.hook = hold
    done = lambda: len(list((tmp_path / "evaluations").glob("*/metrics.json"))) == 3  # noqa: E731
    with pytest.raises(Preempted, match="its state after update 5 is saved"):
        trained(tmp_path, tracker=tracker, shutdown=ToldAtTheEnd(done), in_background=True)
    stack[0].__exit__(None, None, None)
    state = load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints"))
    assert state.extra["pending"] == DUE
    end = trained(tmp_path, in_background=True)
    assert end.is_correct.num_calls == 1
    assert_same_end(end, inline)


def test_adapters_are_removed_once_they_are_pending_at_no_checkpoint_and_records_stay(inline, tmp_path):
    assert not [path for path in (inline.folder / "snapshots").iterdir() if path.is_dir()]
    assert [snapshot.update for snapshot in list_snapshots(inline.folder)] == DUE
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tracker=Stopping(5), in_background=True)
    assert [path.name for path in sorted((tmp_path / "run/snapshots").iterdir()) if path.is_dir()] == [
        f"update-{update:06d}" for update in (0, 2, 4)
    ]


def test_pending_adapter_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tracker=Stopping(4), in_background=True)
    shutil.rmtree(snapshot_path(tmp_path / "run", 0))
    with pytest.raises(IntegrityError, match=r"update-000000/manifest\.json is damaged: .* found no file"):
        trained(tmp_path)


def test_damaged_evaluation_is_done_again(inline, tmp_path, caplog):
    shutil.copytree(inline.folder.parent / "evaluations", tmp_path / "evaluations")
    for path in (tmp_path / "evaluations").glob("*/scores.json"):
        path.write_text("{}")
    end = trained(tmp_path)
    assert end.is_correct.num_calls == len(DUE)
    assert "the evaluation is done again:" in caplog.text and "scores.json is damaged" in caplog.text
    assert_same_end(end, inline)


def test_store_has_the_scores_of_every_image(inline):
    for snapshot in list_snapshots(inline.folder):
        scores = json.loads((inline.folder.parent / "evaluations" / snapshot.key / "scores.json").read_text())
        metrics = read_metrics(inline.folder.parent / "evaluations", snapshot.key)
        assert scores.keys() == {"correct", "light"}
        assert torch.tensor(scores["light"]).shape == (len(EVALUATION), 1)
        assert torch.tensor(scores["light"]).mean().item() == pytest.approx(metrics["evaluation/light"])


def test_policy_is_as_it_was_after_using_another_adapter():
    policy, other = make_tiny_policy(), make_tiny_policy()
    disturb(other)
    before = adapter_of(policy)
    with pytest.raises(KeyError), use_adapter(policy, _files_of(other)):
        assert_same(adapter_of(policy), adapter_of(other))
        raise KeyError
    assert_same(adapter_of(policy), before)


def _files_of(policy: Any) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        policy.save_adapter(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_key_depends_on_every_file_and_on_the_fingerprint():
    keys = {
        evaluation_key("fingerprint", {"a": b"1", "b": b"2"}),
        evaluation_key("other", {"a": b"1", "b": b"2"}),
        evaluation_key("fingerprint", {"a": b"2", "b": b"1"}),
        evaluation_key("fingerprint", {"a": b"1"}),
    }
    assert len(keys) == 4
    assert evaluation_key("fingerprint", {"b": b"2", "a": b"1"}) in keys


def test_claim_is_exclusive_and_free_again_after_it(tmp_path):
    path = tmp_path / "new/claim"
    with exclusive_lock(path) as first, exclusive_lock(path) as second:
        assert first and not second
    with exclusive_lock(path) as third:
        assert third


def test_snapshots_are_listed_read_and_pruned(tmp_path):
    for update in (10, 2):
        publish_snapshot(tmp_path, update, "fingerprint", None, lambda folder: (folder / "weights").write_bytes(b"x"))
    assert [(each.update, each.mlflow_run_id) for each in list_snapshots(tmp_path)] == [(2, None), (10, None)]
    assert read_snapshot(tmp_path, 2) == {"weights": b"x"}
    prune_snapshots(tmp_path, {10})
    with pytest.raises(IntegrityError, match="found no file"):
        read_snapshot(tmp_path, 2)
    assert read_snapshot(tmp_path, 10) == {"weights": b"x"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_project(folder)
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    with inside(tmp_path):
        yield tmp_path


def run_of(project: Path) -> Path:
    return Path(json.loads((project / "reports/training.json").read_text())["folder"])


def untimed(path: Path) -> Any:
    content = json.loads(path.read_text())
    return timeless(content if isinstance(content, list) else [content])


def test_command_evaluates_a_snapshot_of_a_training_that_goes_on(project, monkeypatch, capsys):
    assert main(["train"]) == 0
    expected = shutil.copytree(project / "reports/train", project / "expected")
    adapter = next((project / "models/policy/adapter").iterdir()).read_bytes()
    shutil.rmtree(project / ".scratch")
    monkeypatch.setenv("SFGRPO_EVALUATION_DEVICE", "cpu")
    statuses: list[int] = []
    logged = RecordingTracker.log_metrics

    def log_metrics(self: RecordingTracker, metrics: Any, step: int) -> None:
        logged(self, metrics, step)
        if "reward/mean" in metrics and step == 2:
            statuses.extend(main(["evaluate-snapshot", str(run_of(project)), "0"]) for _ in range(2))

    monkeypatch.setattr(RecordingTracker, "log_metrics", log_metrics)
    assert main(["train"]) == 0
    assert statuses == [0, 0]
    assert capsys.readouterr().out.count("update 0 is evaluated") == 2
    for name in ("history.json", "evaluations.json", "summary.json"):
        assert untimed(project / "reports/train" / name) == untimed(expected / name)
    assert next((project / "models/policy/adapter").iterdir()).read_bytes() == adapter


def test_command_refuses_what_it_cannot_evaluate(project, monkeypatch, capsys):
    assert main(["train"]) == 0
    run = run_of(project)
    assert main(["evaluate-snapshot", str(run), "1"]) == 1
    assert "has no snapshot of update 1; use one of 0, 2, 3" in capsys.readouterr().err
    assert main(["evaluate-snapshot", str(project), "1"]) == 1
    assert "has no snapshot of update 1; it has none yet" in capsys.readouterr().err
    (snapshot, *_) = list_snapshots(run)
    with claimed_evaluation(run.parent / "evaluations", snapshot.key):
        assert main(["evaluate-snapshot", str(run), "0"]) == 0
    assert "update 0 is being evaluated by another process" in capsys.readouterr().out
    publish_snapshot(run, 0, "other", None, lambda folder: (folder / "weights").write_bytes(b"x"))
    assert main(["evaluate-snapshot", str(run), "0"]) == 2
    assert "was published by other code or models, or for another kind of device than cpu" in capsys.readouterr().err


def test_device_of_another_kind_is_refused_before_anything_loads(project, monkeypatch, capsys):
    monkeypatch.setenv("SFGRPO_EVALUATION_DEVICE", "cuda:1")
    assert main(["train"]) == 2
    assert "SFGRPO_EVALUATION_DEVICE: cuda:1 is no device of the training's kind, cpu" in capsys.readouterr().err
    assert not (project / ".scratch").exists()
