"""What is registered is what was evaluated: files of two trainings or evaluations are never combined."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfgrpo.cli import main
from sfgrpo.policies.adapter import read_adapter
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.prompts import prompts_digest, read_prompts, write_prompts
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.training.published import reason_of_no_change
from tests.support.recording import RecordingTracker
from tests.support.tiny import Light, disturb, make_tiny_policy
from tests.support.tiny_run import TINY, build_tiny_project, inside, write_params

# Not ours to mend: deprecations of diffusers and MLflow, and of what they import.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

ADAPTER = Path("models/policy/adapter/pytorch_lora_weights.safetensors")
LAST_ADAPTER = Path("models/policy/last_adapter/pytorch_lora_weights.safetensors")
RECORD, REPORT = Path("models/policy/training.json"), Path("reports/evaluate/metrics.json")
PROMPTS = Path("data/prompts/evaluation.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose policy is trained and evaluated."""
    folder = tmp_path_factory.mktemp("evaluated")
    build_tiny_project(folder)
    with inside(folder):
        assert main(["train"]) == main(["evaluate"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def tracker(folder: Path) -> Iterator[RecordingTracker]:
    with inside(folder) as tracker:
        yield tracker


@pytest.fixture
def unloaded(tracker: RecordingTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which the base model is loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the base model is loaded")

    monkeypatch.setattr(SD3Policy, "from_pretrained", refuse)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit_json(path: Path, *keys: str, value: Any) -> None:
    content = place = read_json(path)
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def assert_refused(stage: str, capsys: pytest.CaptureFixture[str], complaint: str) -> None:
    """Check that a stage ends with one sentence and the status of what another attempt does not help."""
    capsys.readouterr()
    assert main([stage]) == 2
    printed = capsys.readouterr().err
    last = printed.splitlines()[-1]
    assert re.search(f"^error: .*{complaint}", last), printed
    assert "Traceback" not in printed
    assert not Path("mlflow.db").exists(), "the registry was not even opened"


def test_every_artifact_names_what_it_is_of(folder, tracker):
    record, report, adapter = read_json(RECORD), read_json(REPORT), read_adapter(ADAPTER.parent)
    training, validation, evaluation = (
        prompts_digest(read_prompts(PROMPTS.with_stem(name))) for name in ("train", "validation", "evaluation")
    )
    assert record["adapter_sha256"] == adapter.sha256 == report["evaluated"]["adapter_sha256"]
    assert read_json(Path("reports/train/summary.json"))["adapter_sha256"] == adapter.sha256
    assert record["base"] == {"name": "models/tiny", "revision": report["evaluated"]["base_revision"]}
    assert (adapter.base.name, adapter.base.revision) == tuple(record["base"].values())
    assert (record["training_prompts_sha256"], record["evaluation_prompts_sha256"]) == (training, evaluation)
    assert record["validation_prompts_sha256"] == validation
    last = read_adapter(LAST_ADAPTER.parent).sha256
    assert record["last_adapter_sha256"] == last
    assert report["adapters"] == {
        "last": {"update": record["num_updates"], "sha256": last},
        "policy": {"update": record["update"], "sha256": adapter.sha256},
    }
    assert report["evaluated"]["prompts_sha256"] == evaluation
    assert report["evaluated"]["protocol"]["num_steps"] == TINY["evaluation.num_steps"]
    assert report["evaluated"]["rewards"][0]["name"] == "light"
    assert record["nothing_changed"] is None
    table = Path("reports/evaluate/table.md").read_text()
    assert f"\n\nAdapter {adapter.sha256[:12]}, base " in table and f"prompts {evaluation[:12]}, protocol " in table


def test_policy_that_was_trained_anew_is_not_registered_with_the_old_report(folder, tracker, capsys):
    old = read_json(REPORT)["evaluated"]["adapter_sha256"]
    write_params(folder, {**TINY, "seed": 6})
    assert main(["train"]) == 0
    new = read_json(RECORD)["adapter_sha256"]
    assert new != old
    assert (tracker.tags["adapter_sha256"], tracker.tags["nothing_changed"]) == (new, "no")
    assert_refused("register", capsys, f"adapter_sha256 {old} instead of {new}; .*`python -m sfgrpo evaluate`")


def test_new_training_and_evaluation_make_another_version(folder, tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    assert main(["register"]) == 0
    write_params(folder, {**TINY, "evaluation.num_steps": 3})
    assert main(["evaluate"]) == main(["register"]) == 0
    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    name = read_json(Path("reports/registered.json"))["name"]
    first, second = (dict(client.get_model_version(name, number).tags) for number in ("1", "2"))
    report = read_json(REPORT)["evaluated"]
    assert first["adapter_sha256"] == second["adapter_sha256"] == report["adapter_sha256"]
    assert second["base_revision"] == report["base_revision"]
    assert second["evaluation_prompts_sha256"] == report["prompts_sha256"]
    assert second["prompts_sha256"] == read_json(RECORD)["training_prompts_sha256"]
    assert second["evaluation_protocol_sha256"] == report["protocol_sha256"] != first["evaluation_protocol_sha256"]
    assert first["evaluation_sha256"] != second["evaluation_sha256"]
    assert second["run_key"] == read_json(RECORD)["run_key"]


@pytest.mark.parametrize(
    "changes", [{"policy.lora_alpha": 800}, {"policy.lora_rank": 7, "policy.lora_targets": ["to_q"]}]
)
def test_adapter_is_evaluated_as_it_was_trained_whatever_the_parameters_say(folder, tracker, caplog, changes):
    before = read_json(REPORT)
    write_params(folder, {**TINY, **changes})
    assert main(["evaluate"]) == 0
    assert read_json(REPORT) == before
    assert "but the adapter was trained with" in caplog.text


def edit_weights(change: Callable[[str, Tensor], Tensor], path: Path = ADAPTER, *, record: bool = False) -> None:
    """Change the weights of a published adapter, and the record with it where that is asked for."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = {name: change(name, weight) for name, weight in load_file(path).items()}
    save_file(changed, path, metadata)
    if record:
        edit_json(RECORD, "adapter_sha256", value=read_adapter(ADAPTER.parent).sha256)


def replace_adapter(**options: Any) -> None:
    policy = make_tiny_policy(**options)
    disturb(policy)
    policy.save_adapter(ADAPTER.parent)


def other_base() -> None:
    """Change the base model, and its manifest with it."""
    path = Path("models/tiny/scheduler/scheduler_config.json")
    path.write_text(json.dumps(read_json(path) | {"shift": 3.0}))
    write_manifest(Path("models/tiny"))


def forget(path: Path, name: str) -> None:
    content = read_json(path)
    del content[name]
    path.write_text(json.dumps(content))


UNUSABLE_POLICY: dict[str, tuple[Callable[[], object], str]] = {
    "never trained": (lambda: shutil.rmtree("models/policy"), "training.json does not exist; `python -m sfgrpo train`"),
    "no record": (RECORD.unlink, "training.json does not exist; `python -m sfgrpo train` writes it"),
    "empty record": (lambda: RECORD.write_text(""), "training.json is no record of a training by this version"),
    "record of another kind": (lambda: RECORD.write_text("[]"), "training.json is no record of a training"),
    "record of an older version": (lambda: forget(RECORD, "adapter_sha256"), "is no record .*adapter_sha256"),
    "no adapter": (lambda: shutil.rmtree(ADAPTER.parent), "safetensors does not exist; `python -m sfgrpo train`"),
    "no file": (ADAPTER.unlink, "safetensors does not exist; `python -m sfgrpo train` writes"),
    "truncated": (lambda: ADAPTER.write_bytes(ADAPTER.read_bytes()[:-9]), r"is truncated: it has \d+ of \d+ bytes"),
    "another format": (lambda: ADAPTER.write_bytes(b"PK\3\4 something else"), "is not a safetensors file"),
    "nan": (lambda: edit_weights(lambda name, weight: weight * math.nan), "has NaN or infinite weights in"),
    "zero": (
        lambda: edit_weights(lambda name, weight: 0 * weight, record=True),
        "changes nothing, so there is nothing",
    ),
    "other weights": (lambda: edit_weights(lambda name, weight: 2 * weight), "and models/policy/training.json is of"),
    "other rank": (lambda: replace_adapter(lora_rank=1), "and models/policy/training.json is of the adapter"),
    "other base": (other_base, r"was trained on models/tiny \(sha256:\w+\) and the base model is models/tiny"),
    "no last adapter": (LAST_ADAPTER.unlink, "last_adapter/.* does not exist; `python -m sfgrpo train` writes"),
    "another last adapter": (
        lambda: edit_weights(lambda name, weight: 2 * weight, LAST_ADAPTER),
        "last_adapter/.* has the SHA-256 .*, and models/policy/training.json is of the adapter",
    ),
    "no base": (lambda: shutil.rmtree("models/tiny"), "policy.pretrained: models/tiny is no folder with a model_index"),
}
"""What can be wrong with a trained policy, each with the complaint."""


@pytest.mark.parametrize("problem", UNUSABLE_POLICY)
def test_unusable_policy_is_neither_evaluated_nor_registered(folder, unloaded, capsys, problem):
    happen, complaint = UNUSABLE_POLICY[problem]
    happen()
    for stage in ("evaluate", "register"):
        assert_refused(stage, capsys, complaint)


def other_prompts() -> None:
    write_prompts(PROMPTS, read_prompts(PROMPTS)[:-1])


UNUSABLE_PROMPTS: dict[str, tuple[Callable[[], object], str]] = {
    "no folder": (
        lambda: shutil.rmtree(PROMPTS.parent),
        "evaluation.jsonl does not exist; write it by `python -m sfgrpo prompts`",
    ),
    "no file": (PROMPTS.unlink, "evaluation.jsonl does not exist; write it by `python -m sfgrpo prompts`"),
    "others": (other_prompts, "and the training of models/policy kept out the prompts .* may have used others"),
}


@pytest.mark.parametrize("problem", UNUSABLE_PROMPTS)
def test_prompts_of_another_training_are_not_evaluated_on(folder, unloaded, capsys, problem):
    happen, complaint = UNUSABLE_PROMPTS[problem]
    happen()
    assert_refused("evaluate", capsys, complaint)


OTHER_REPORTS: dict[str, tuple[Callable[[], object], str]] = {
    "never evaluated": (
        lambda: shutil.rmtree("reports/evaluate"),
        "metrics.json does not exist; .* evaluate` writes it",
    ),
    "broken": (lambda: REPORT.write_text("{"), "metrics.json does not say what it is of"),
    "another kind": (lambda: REPORT.write_text("[]"), "metrics.json does not say what it is of"),
    "older version": (lambda: forget(REPORT, "evaluated"), "metrics.json does not say what it is of .*evaluated"),
    "without scores": (lambda: forget(REPORT, "policy"), "metrics.json does not say what it is of .*policy"),
    "edited protocol": (
        lambda: edit_json(REPORT, "evaluated", "protocol", "num_steps", value=40),
        "does not say what it is of .*the protocol is not that of its digest",
    ),
    "other adapter": (
        lambda: edit_json(REPORT, "evaluated", "adapter_sha256", value="ab"),
        r"is of another evaluation .*: adapter_sha256 ab instead of \w{64}; evaluate again",
    ),
    "other base": (
        lambda: edit_json(REPORT, "evaluated", "base_revision", value="sha256:ab"),
        "base_revision sha256:ab instead of sha256:",
    ),
    "other prompts": (
        lambda: edit_json(REPORT, "evaluated", "prompts_sha256", value="ab"),
        "prompts_sha256 ab instead of",
    ),
}


@pytest.mark.parametrize("problem", OTHER_REPORTS)
def test_report_of_something_else_is_not_registered(folder, unloaded, capsys, problem):
    happen, complaint = OTHER_REPORTS[problem]
    happen()
    assert_refused("register", capsys, complaint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluation.num_steps", 3),
        ("evaluation.guidance_scale", 4.5),
        ("evaluation.images_per_prompt", 1),
        ("evaluation.seed", 1),
        ("policy.resolution", 24),
        ("policy.dtype", "bfloat16"),
        ("policy.max_sequence_length", 77),
    ],
)
def test_version_would_draw_otherwise_than_it_was_evaluated(folder, unloaded, capsys, name, value):
    write_params(folder, {**TINY, name: value})
    short, was = name.rpartition(".")[2], {**TINY, "policy.resolution": 32, "evaluation.seed": 1234}
    was |= {"policy.max_sequence_length": 0}
    assert_refused("register", capsys, f"{short} {was[name]} instead of {value}; evaluate again")


def test_micro_batches_and_intervals_are_no_part_of_what_was_evaluated(folder, unloaded, monkeypatch):
    from sfgrpo.registry import register

    registered: list[Any] = []

    def note(**arguments: Any) -> Any:
        registered.append(arguments)
        return register.RegisteredVersion(name="n", version=1, alias="a", run_id="r", created=True)

    monkeypatch.setattr(register, "register_version", note)
    write_params(folder, {**TINY, "evaluation.micro_batch_size": 1, "evaluation.every_num_updates": 1})
    assert main(["register"]) == 0
    assert registered[0]["adapter"].metrics.keys() >= {"geneval/overall"}


class Flat(Light):
    """Likes all images alike."""

    def __call__(self, images, prompts):
        return torch.zeros(len(images))


class Fading(Light):
    """Lightness, less with every call: each evaluation is worse than the one before."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, images, prompts):
        self.num_calls += 1
        return super().__call__(images, prompts) - self.num_calls


@pytest.fixture
def untrained(folder: Path) -> Path:
    for name in ("models/policy", "reports", ".scratch"):
        shutil.rmtree(folder / name)
    return folder


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (Flat, "in none of the 3 updates did the images of a prompt get different rewards; use a reward that"),
        (Fading, r"every evaluation was worse than that before the first update, evaluation/light -\d+\.\d{3}; train"),
    ],
)
def test_training_that_changes_nothing_says_so_and_is_not_registered(untrained, capsys, reward, reason):
    with inside(untrained, reward) as tracker:
        assert main(["train"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.match(f"the training has changed nothing, and `register` will refuse it: {reason}", last)
        assert re.match(reason, read_json(RECORD)["nothing_changed"])
        assert re.match(reason, tracker.tags["nothing_changed"])
        for stage in ("evaluate", "register"):
            assert_refused(stage, capsys, f"changes nothing, so there is nothing to evaluate or register: {reason}")


def history(*fractions: float) -> list[dict[str, float]]:
    return [{"groups/constant_fraction": fraction} for fraction in fractions]


@pytest.mark.parametrize(
    ("fractions", "update", "trained", "reason"),
    [
        ((1.0, 1.0), 2, True, "in none of the 2 updates"),
        ((1.0, 0.9), 2, True, None),
        ((0.0, 0.0), 0, True, "every evaluation was worse"),
        ((0.0, 0.0), 2, False, "no optimiser step before update 2 changed the adapter"),
    ],
)
def test_reason_why_nothing_changed(tmp_path, fractions, update, trained, reason):
    policy = make_tiny_policy()
    if trained:
        disturb(policy)
    policy.save_adapter(tmp_path)
    best = {"update": update, "metrics": {"evaluation/light": 0.25}}
    found = reason_of_no_change(history(*fractions), best, "evaluation/light", read_adapter(tmp_path))
    assert found is None if reason is None else str(found).startswith(reason)
