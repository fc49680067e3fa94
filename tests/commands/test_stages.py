"""The stages on a tiny pipeline: what they write, what they refuse, and how a training survives what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfgrpo.checkpoint.state import latest_checkpoint
from sfgrpo.cli import main
from sfgrpo.errors import MirrorError
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.factory import make_text_encoders
from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.paths import run_lock
from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.rewards import CONFIRMED_VERDICTS, REWARDS
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import verify_manifest
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.training import run as training_run
from sfgrpo.types import TAGS, Prompt
from tests.support.recording import RecordingTracker
from tests.support.secrets_search import in_folder
from tests.support.tiny import Light
from tests.support.tiny_run import (
    RECORD,
    ROOT,
    TINY,
    build_tiny_project,
    failing,
    inside,
    numbers_of,
    read_history,
    write_params,
)

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GENEVAL_COUNTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}


SIX_EACH = dict.fromkeys(TAGS, 6)
MODELS = ["base", "last", "policy"]


def only_best(update: int | None) -> type[Light]:
    """Return a verdict that finds all images right in the evaluation of one update, 0, 2 or 3, and none in others."""

    class OnlyBest(Light):
        def __init__(self) -> None:
            self.updates = [0, 2, 3]

        def __call__(self, images, prompts):
            is_right = bool(self.updates) and self.updates.pop(0) == update
            return torch.full((len(images),), float(is_right))

    return OnlyBest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_project(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def tracker(folder: Path) -> Iterator[RecordingTracker]:
    with inside(folder) as tracker:
        yield tracker


def checkpoints(folder: Path) -> Path:
    (found,) = (folder / ".scratch").glob("train-*/checkpoints")
    return found


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_error(capsys: pytest.CaptureFixture[str], complaint: str) -> None:
    """Check that the output ends with one error, and with which."""
    printed = capsys.readouterr().err
    assert re.search(f"error: .*{complaint}", printed.splitlines()[-1]), printed


def prompt_sets(folder: Path) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Read the training, the validation and the evaluation prompts."""
    return (
        read_prompts(folder / "data/prompts/train.jsonl"),
        read_prompts(folder / "data/prompts/validation.jsonl"),
        read_prompts(folder / "data/prompts/evaluation.jsonl"),
    )


def assert_disjoint(training: list[Prompt], validation: list[Prompt], evaluation: list[Prompt]) -> None:
    """Check that no two of the sets ask for the same."""
    keys = [set(map(twin_key, prompts)) for prompts in (training, validation, evaluation)]
    assert all(keys) and sum(map(len, keys)) == len(set().union(*keys))


def test_prompts_are_written_as_asked(folder, tracker):
    training, validation, evaluation = prompt_sets(folder)
    assert len(training) == TINY["prompts.num_train"]
    assert [prompt.tag for prompt in validation] == [prompt.tag for prompt in evaluation] == list(TAGS)
    written = sorted(path.name for path in Path("data/prompts").iterdir())
    assert written == ["evaluation.jsonl", "manifest.json", "train.jsonl", "validation.jsonl"]


def test_shipped_parameters_train_on_no_held_out_prompt_nor_its_twin(tmp_path, capsys):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with inside(tmp_path):
        assert main(["prompts"]) == 0
    training, validation, evaluation = prompt_sets(tmp_path)
    assert_disjoint(training, validation, evaluation)
    told = capsys.readouterr().out
    assert f"{len(training)} training prompts" in told and f"{len(validation)} validation prompts" in told


EDITIONS = {
    "shapes": {},
    "geneval": {"prompts.source": "geneval", "prompts.num_train": 300, "prompts.num_evaluation": GENEVAL_COUNTS},
}


@pytest.mark.parametrize("source", EDITIONS)
def test_every_edition_has_other_training_prompts_and_the_same_held_out_ones(tmp_path, source):
    shutil.copytree(ROOT / "data/geneval", tmp_path / "data/geneval")
    sets = {}
    for edition in (None, 0, 1, 2):
        changes = {} if edition is None else {"prompts.edition": edition}
        write_params(tmp_path, {**EDITIONS[source], **changes})
        with inside(tmp_path):
            assert main(["prompts"]) == 0
        sets[edition] = prompt_sets(tmp_path)
    training = {edition: tuple(prompt.text for prompt in sets[edition][0]) for edition in sets}
    assert training[None] == training[0]
    assert len({training[0], training[1], training[2]}) == 3
    assert len({len(prompts) for prompts in training.values()}) == 1
    assert all(prompts[1:] == sets[0][1:] for prompts in sets.values())
    for prompts in sets.values():
        assert_disjoint(*prompts)


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "data/geneval", tmp_path / "data/geneval")
    changes = {"prompts.source": "geneval", "prompts.num_train": 300, "prompts.num_evaluation": GENEVAL_COUNTS}
    write_params(tmp_path, changes)
    return tmp_path


def test_geneval_prompts_are_the_published_ones_and_not_trained_on(geneval):
    with inside(geneval):
        assert main(["prompts"]) == 0
    training, validation, evaluation = prompt_sets(geneval)
    assert evaluation == read_prompts(geneval / "data/geneval/evaluation_metadata.jsonl")
    assert len(training) == 300
    assert_disjoint(training, validation, evaluation)
    assert len(set(map(twin_key, validation))) == len(validation)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts.num_evaluation.colors": 10}, "prompts.num_evaluation: .*with prompts.source geneval it must be"),
        (
            {"prompts.source": "shapes", "prompts.num_evaluation.colors": 94},
            "prompts.num_evaluation: task single_object has 6 prompts, fewer than the 80",
        ),
        (
            {"prompts.num_validation.single_object": 1},
            "prompts.num_validation: task single_object has 0 prompts that are not evaluated on, fewer than the 1",
        ),
        (
            {"prompts.source": "shapes", "prompts.num_evaluation": SIX_EACH, "prompts.num_validation.single_object": 1},
            "prompts.num_validation: task single_object has 0 prompts that are not evaluated on, fewer than the 1",
        ),
        (
            {"prompts.task_weights.single_object": 1},
            "prompts.task_weights: all prompts of task single_object are held out",
        ),
    ],
)
def test_impossible_prompt_counts_are_wrong_parameters(geneval, capsys, changes, complaint):
    params = {"prompts.source": "geneval", "prompts.num_evaluation": dict(GENEVAL_COUNTS)}
    write_params(geneval, params | changes)
    with inside(geneval):
        assert main(["prompts"]) == 2
    assert_error(capsys, complaint)


def add_to(name: str, held_out: str) -> None:
    """Append the first prompt of a file to another, in other words."""
    path = Path(f"data/prompts/{name}.jsonl")
    asked = path.with_stem(held_out).read_text().split("\n")[0]
    path.write_text(f"{path.read_text()}{asked.replace('a photo of', 'photo of')}\n")


def repeat_a_line(path: str) -> None:
    Path(path).write_text(Path(path).read_text() + Path(path).read_text().split("\n")[0] + "\n")


def lengthen(path: str) -> None:
    Path(path).write_text(Path(path).read_text().replace("a photo of a", "a photo of a very, very, very large"))


WRONG_PROMPTS = {
    "overlap": (lambda: add_to("train", "evaluation"), r"train.jsonl:17: 1 of 17 training prompts are evaluated on"),
    "overlap with validation": (
        lambda: add_to("train", "validation"),
        r"train.jsonl:17: 1 of 17 training prompts are validation prompts",
    ),
    "validation overlaps": (
        lambda: add_to("validation", "evaluation"),
        r"validation.jsonl:7: 1 of 7 validation prompts are evaluated on",
    ),
    "no validation": (
        lambda: Path("data/prompts/validation.jsonl").unlink(),
        r"data/prompts/validation.jsonl does not exist; write it by `python -m sfgrpo prompts`",
    ),
    "repeated": (
        lambda: repeat_a_line("data/prompts/evaluation.jsonl"),
        r"evaluation.jsonl:7: 1 of 7 evaluation prompts repeat an earlier one",
    ),
    "long": (
        lambda: lengthen("data/prompts/evaluation.jsonl"),
        r"evaluation.jsonl:\d: no text encoder of the base model reads the whole of .*takes 12 tokens of",
    ),
    "unknown class": (
        lambda: Path("data/prompts/evaluation.jsonl").write_text(
            '\n{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a ring"}'
        ),
        r'evaluation.jsonl:2: reward geneval_correct knows no class "dog"',
    ),
    "absent": (
        lambda: shutil.rmtree("data/prompts"),
        r"data/prompts/(train|evaluation).jsonl does not exist; write it by `python -m sfgrpo prompts`",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PROMPTS)
def test_wrong_prompts_are_refused_before_a_model_is_loaded(folder, tracker, capsys, monkeypatch, wrong):
    edit, complaint = WRONG_PROMPTS[wrong]
    edit()
    monkeypatch.setattr(SD3Policy, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    assert main(["train"]) == 2
    assert_error(capsys, complaint)
    assert tracker.status is None
    assert not list(Path().glob(".scratch/train-*"))


def test_evaluation_refuses_prompts_that_its_model_cannot_read(folder, tracker, capsys, monkeypatch):
    assert main(["train"]) == 0
    short = [dataclasses.replace(encoder, max_tokens=4) for encoder in make_text_encoders("models/tiny", None, 0)]
    monkeypatch.setattr("sfgrpo.commands.evaluate.make_text_encoders", lambda *_: short)
    monkeypatch.setattr(SD3Policy, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    assert main(["evaluate"]) == 2
    assert_error(capsys, "evaluation.jsonl:1: no text encoder of the base model reads the whole of")


def test_credentials_of_addresses_are_kept_nowhere(folder, tracker, monkeypatch):
    secret, other = "S3cret%2Fof%40the-store", "another-S3cret"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{secret}@db:5432/mlflow?sslpassword={other}")
    monkeypatch.setenv("SFGRPO_FLOW_RUN_URL", f"http://me:{secret}@prefect/runs/flow-run/1")
    assert main(["train"]) == 0
    record = json.loads(Path("models/policy/training.json").read_text())
    assert record["tracking_uri"] == "postgresql://db:5432/mlflow"
    assert tracker.tags["prefect.flow_run_url"] == "http://prefect/runs/flow-run/1"
    assert in_folder(folder, {"the secret": secret, "the other": other}) == []
    records = repr([tracker.tags, tracker.params, tracker.texts])
    assert secret not in records and other not in records


def test_training_publishes_the_best_adapter_with_its_reports(folder, tracker):
    assert main(["train"]) == 0
    record = json.loads(Path("models/policy/training.json").read_text())
    assert Path("models/policy/adapter/pytorch_lora_weights.safetensors").exists()
    assert (record["num_updates"], record["images"], record["mlflow_run_id"]) == (3, 18, "recorded")
    evaluations = json.loads(Path("reports/train/evaluations.json").read_text())
    assert [evaluation["update"] for evaluation in evaluations] == [0, 2, 3]
    assert json.loads(Path("reports/train/summary.json").read_text())["best_update"] == record["update"]
    assert [path.name for path in sorted(Path("reports/train").glob("*.png"))] == [
        f"samples_{update:06d}.png" for update in (0, 2, 3)
    ]


def test_training_is_tracked(folder, tracker):
    assert main(["train"]) == 0
    assert tracker.status == "FINISHED"
    assert [step for step, _ in tracker.metrics["reward/mean"]] == [1, 2, 3]
    assert [step for step, _ in tracker.metrics["geneval/overall"]] == [0, 2, 3]
    assert tracker.params["sampling.num_steps"] == "3"
    assert {"git_commit", "prompts_sha256", "best_update"} <= tracker.tags.keys()
    assert [(name, context) for name, context, _ in tracker.prompts] == [
        ("training-prompts", "training"),
        ("validation-prompts", "validation"),
        ("evaluation-prompts", "evaluation"),
    ]


def test_tiny_training_gives_the_recorded_numbers(folder, tracker):
    assert main(["train"]) == 0
    recorded = json.loads(RECORD.read_text())
    assert len(recorded) == TINY["update.num_updates"]
    for found, expected in zip(numbers_of(folder), recorded, strict=True):
        # Another processor adds up in another order.
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), "CONTRIBUTING.md says how to record anew"


def test_finished_training_is_not_repeated(folder, tracker):
    assert main(["train"]) == 0
    shutil.rmtree("models/policy")
    with inside(folder, failing("raise")):
        assert main(["train"]) == 0
    assert Path("models/policy/adapter").exists()


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("nan", r"reward light gave nan for image \d+ \('a photo of .*'\)"),
        ("count", r"reward light gave \[\d+\] torch.float32 for \d+ images from \['a photo of .*'\] on"),
        ("raise", r"reward light failed on image 0 \('a photo of .*'\): the lamp is broken"),
    ],
)
def test_failing_reward_stops_the_training_and_costs_no_checkpoint(folder, capsys, caplog, kind, complaint):
    caplog.set_level("INFO")
    with inside(folder, failing(kind)) as tracker:
        assert main(["train"]) == 1
    assert_error(capsys, complaint)
    assert tracker.status == "FAILED"
    verify_manifest(checkpoints(folder) / "update-000001")
    with inside(folder):
        assert main(["train"]) == 0
    assert "resuming after update 1" in caplog.text
    assert [metrics["update"] for metrics in read_history(folder)] == [1, 2, 3]


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(folder, tracker, caplog):
    caplog.set_level("INFO")
    assert main(["train"]) == 0
    expected = read_history(folder)
    flip_a_byte(checkpoints(folder) / "update-000003/state.safetensors")
    assert main(["train"]) == 0
    assert "checkpoint update-000003 is skipped" in caplog.text
    assert "resuming after update 2" in caplog.text
    assert read_history(folder) == expected
    assert latest_checkpoint(checkpoints(folder)).name == "update-000003"


def test_run_goes_on_by_its_name_with_its_own_parameters_and_prompts(folder, tracker, capsys):
    with inside(folder, failing("raise")):
        assert main(["train"]) == 1
    (run,) = Path(".scratch").glob("train-*")
    shutil.rmtree("data/prompts")
    write_params(folder, {**TINY, "seed": 5, "update.num_updates": 9})
    assert main(["train", "--resume", run.name]) == 0
    record = json.loads(Path("models/policy/training.json").read_text())
    assert record["num_updates"] == TINY["update.num_updates"]
    assert f"train-{record['run_key'][:16]}" == run.name
    assert [path.name for path in Path(".scratch").glob("train-*")] == [run.name]


def test_run_goes_on_with_smaller_micro_batches(folder, tracker, caplog):
    caplog.set_level("INFO")
    with inside(folder, failing("raise")):
        assert main(["train"]) == 1
    write_params(folder, {**TINY, "rollout.micro_batch_size": 1, "update.micro_batch_size": 1})
    assert main(["train"]) == 0
    assert "resuming after update 1" in caplog.text
    assert len(list(Path(".scratch").glob("train-*"))) == 1


class Away:
    """A mirror whose bucket is out of reach; it counts the requests to upload."""

    num_syncs = 0

    def __init__(self, uri: str, folder: Path, encryption: str | None) -> None:
        pass

    def sync(self) -> None:
        Away.num_syncs += 1

    def close(self, timeout_s: float) -> None:
        pass


def unreachable(uri: str, folder: Path) -> bool:
    raise MirrorError(f"{uri} is out of reach")


def test_run_needs_its_mirror_only_where_nothing_else_has_it(folder, tracker, monkeypatch, capsys, caplog):
    monkeypatch.setenv("SFGRPO_MIRROR", "s3://runs/test")
    monkeypatch.setattr("sfgrpo.storage.mirror.Mirror", Away)
    monkeypatch.setattr("sfgrpo.storage.restore.restore_run", unreachable)
    assert main(["train"]) == 1
    assert_error(capsys, "s3://runs/test is out of reach")
    monkeypatch.delenv("SFGRPO_MIRROR")
    with inside(folder, failing("raise")):
        assert main(["train"]) == 1
    with inside(folder):
        monkeypatch.setenv("SFGRPO_MIRROR", "s3://runs/test")
        assert main(["train"]) == 0
    assert "the run goes on from what this machine has of it: s3://runs/test is out of reach" in caplog.text
    # At the start, since an earlier start may have uploaded less than it saved, and after each of the two checkpoints.
    assert Away.num_syncs == 3


def test_sharding_needs_something_to_shard_over(folder, tracker, capsys):
    params = json.loads((folder / "params.yaml").read_text()) | {"launch": {"sharding": "full"}}
    (folder / "params.yaml").write_text(json.dumps(params))
    assert main(["train"]) == 2
    assert_error(capsys, "launch.sharding: full spreads the frozen weights over processes, and there is one; use none")


def test_unknown_run_is_an_error_with_the_cure(folder, tracker, capsys):
    assert main(["train", "--resume", "train-0"]) == 1
    assert_error(capsys, "no run train-0 in .scratch; set SFGRPO_MIRROR to the bucket that has it, or start it anew")


def test_evaluation_compares_before_and_after(folder, tracker):
    assert main(["train"]) == 0
    assert main(["evaluate"]) == 0
    metrics = json.loads(Path("reports/evaluate/metrics.json").read_text())
    gain = metrics["policy"]["geneval/overall"] - metrics["base"]["geneval/overall"]
    assert metrics["gain"]["geneval/overall"] == gain
    record = json.loads(Path("models/policy/training.json").read_text())
    assert record["num_updates"] == metrics["adapters"]["last"]["update"] == TINY["update.num_updates"]
    assert record["update"] == metrics["adapters"]["policy"]["update"]
    assert metrics["base"]["geneval/num_images"] == len(TAGS) * TINY["evaluation.images_per_prompt"]
    table = Path("reports/evaluate/table.md").read_text()
    assert "| base model |" in table
    assert "| last adapter (update 3) |" in table
    assert f"| best adapter (update {record['update']}) |" in table
    with Image.open("reports/evaluate/samples.png") as grid:
        assert grid.format == "PNG"
    with tarfile.open("reports/evaluate/images.tar") as tar:
        names = tar.getnames()
    num_images = len(TAGS) * TINY["evaluation.images_per_prompt"]
    models = ["base", "policy"] if record["adapter_sha256"] == record["last_adapter_sha256"] else MODELS
    assert list(dict.fromkeys(name.split("/")[0] for name in names)) == models
    assert len(names) == len(models) * num_images
    assert names[0] == "base/00000-single_object/000.png" and names[-1] == "policy/00005-color_attr/001.png"
    packed = Path("reports/evaluate/images.tar").read_bytes()
    assert main(["evaluate"]) == 0
    assert Path("reports/evaluate/images.tar").read_bytes() == packed


class Always(Light):
    """Score every image alike."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def __call__(self, images, prompts):
        return torch.full((len(images),), self.value)


def test_evaluation_warns_of_counts_that_a_counter_disputes(folder, tracker, monkeypatch, capsys):
    assert main(["train"]) == 0
    monkeypatch.setitem(REWARDS, "geneval_correct", lambda: Always("geneval_correct", 1.0))

    def printed(confirmed: float) -> str:
        monkeypatch.setitem(CONFIRMED_VERDICTS, "geneval_correct", lambda: Always("confirmed", confirmed))
        capsys.readouterr()
        assert main(["evaluate"]) == 0
        return capsys.readouterr().out

    disputed = printed(0.0)
    assert "An independent counter confirms 0 of 2 correct counts of the base model.\nWARNING: base model: " in disputed
    assert disputed.count("only 0 of the 2 images that are correct for a prompt that asks for a number") == 3
    agreed = printed(1.0)
    assert "An independent counter confirms 2 of 2 correct counts of the base model.\nAn" in agreed
    assert "WARNING" not in agreed


def test_evaluation_says_where_no_counter_confirms_its_verdicts(folder, tracker, monkeypatch, capsys):
    assert main(["train"]) == 0
    monkeypatch.delitem(CONFIRMED_VERDICTS, "geneval_correct")
    assert main(["evaluate"]) == 0
    assert "This detector has no independent counter: no agreement was measured." in capsys.readouterr().out
    assert not [key for key in json.loads(Path("reports/evaluate/metrics.json").read_text())["base"] if "agree" in key]


def validate_on(path: str) -> None:
    """Let a prompt file take the place of the validation prompts, whose own take its place."""
    other, validation = Path(path), Path("data/prompts/validation.jsonl")
    contents = validation.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    validation.write_bytes(contents[1])


@pytest.fixture
def selected_by_geneval(monkeypatch):
    """Let GenEval's verdict select the best adapter, since a test can prescribe it without changing the training."""
    original = Evaluator.of.__func__

    def of(cls, *arguments):
        return dataclasses.replace(original(cls, *arguments), selected_by="geneval/overall")

    monkeypatch.setattr(Evaluator, "of", classmethod(of))


@pytest.mark.parametrize("best", [2, 3])
@pytest.mark.usefixtures("selected_by_geneval")
def test_evaluation_judges_the_adapters_that_the_training_judged(folder, tracker, monkeypatch, best):
    """The training judges by validation prompts; with the two sets swapped in between the numbers must be its own."""
    monkeypatch.setitem(REWARDS, "geneval_correct", only_best(best))
    assert main(["train"]) == 0
    evaluations = {
        evaluation["update"]: evaluation
        for evaluation in json.loads(Path("reports/train/evaluations.json").read_text())
    }
    record = json.loads(Path("models/policy/training.json").read_text())
    assert (record["update"], record["num_updates"]) == (best, 3)
    assert (record["adapter_sha256"] == record["last_adapter_sha256"]) == (best == 3)
    validate_on("data/prompts/evaluation.jsonl")
    digest = prompts_digest(read_prompts(Path("data/prompts/evaluation.jsonl")))
    assert digest == record["validation_prompts_sha256"] != record["evaluation_prompts_sha256"]
    Path("models/policy/training.json").write_text(json.dumps(record | {"evaluation_prompts_sha256": digest}))
    monkeypatch.setitem(REWARDS, "geneval_correct", only_best(None))
    assert main(["evaluate"]) == 0
    metrics = json.loads(Path("reports/evaluate/metrics.json").read_text())
    for model, update in (("base", 0), ("last", 3), ("policy", best)):
        expected = evaluations[update]
        assert metrics[model]["evaluation/light"] == expected["evaluation/light"]
        assert metrics[model]["geneval/num_images"] == expected["geneval/num_images"]
    assert evaluations[0]["evaluation/light"] != evaluations[2]["evaluation/light"]
    assert evaluations[2]["evaluation/light"] != evaluations[3]["evaluation/light"]
    table = Path("reports/evaluate/table.md").read_text()
    assert ("The last adapter is the best one, and was drawn once." in table) == (best == 3)
    with tarfile.open("reports/evaluate/images.tar") as tar:
        drawn = list(dict.fromkeys(name.split("/")[0] for name in tar.getnames()))
    assert drawn == (["base", "policy"] if best == 3 else MODELS)


class Preferring(Light):
    """Finds right what shows a prompt of one file from the second evaluation on, what shows any other at first."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.validation = {prompt.text for prompt in read_prompts(Path("data/prompts/validation.jsonl"))}

    def __call__(self, images, prompts):
        self.num_calls += 1
        late = self.num_calls > 1
        return torch.tensor([float((prompt.text in self.validation) == late) for prompt in prompts])


@pytest.mark.usefixtures("selected_by_geneval")
@pytest.mark.parametrize("swapped", [False, True])
def test_the_best_adapter_is_chosen_by_the_validation_prompts(folder, tracker, monkeypatch, swapped):
    """On the evaluation prompts the first adapter is the best, on the validation prompts a later one."""
    monkeypatch.setitem(REWARDS, "geneval_correct", Preferring)
    if swapped:
        verdict = Preferring()
        monkeypatch.setitem(REWARDS, "geneval_correct", lambda: verdict)
        validate_on("data/prompts/evaluation.jsonl")
    assert main(["train"]) == 0
    assert json.loads(Path("models/policy/training.json").read_text())["update"] == (0 if swapped else 2)


def test_a_run_of_a_version_without_validation_prompts_is_not_resumed(folder, tracker, capsys):
    assert main(["train"]) == 0
    run = checkpoints(folder).parent
    (run / "inputs/validation.jsonl").unlink()
    for more in ([], ["--accept-code-change"]):
        assert main(["train", "--resume", run.name, *more]) == 2
        assert_error(capsys, f"run {run.name} was started with other code and prompts, and would not be the same run")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_registration_after_an_evaluation_of_few_tasks_has_their_scores(folder, tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    few = {**dict.fromkeys(TAGS, 0), "position": 2}
    write_params(
        folder, {**TINY, "prompts.num_validation": few, "prompts.num_evaluation": few, "update.num_updates": 1}
    )
    for stage in ("prompts", "train", "evaluate", "register"):
        assert main([stage]) == 0
    registered = json.loads(Path("reports/registered.json").read_text())
    version = connect(os.environ["MLFLOW_TRACKING_URI"]).get_model_version(registered["name"], registered["version"])
    assert {name for name in version.tags if name.startswith("geneval/")} == {"geneval/overall", "geneval/position"}


def test_unknown_reward_is_a_wrong_parameter(folder, tracker, capsys):
    unknown = {**TINY, "reward.name": "beauty"}
    write_params(folder, unknown)
    assert main(["train"]) == 2
    assert_error(capsys, "reward: reward 'beauty' is unknown; allowed are .*geneval")
    write_params(folder, TINY)
    assert main(["train"]) == 0
    write_params(folder, unknown)
    assert main(["evaluate"]) == 2
    assert_error(capsys, "reward: reward 'beauty' is unknown; allowed are .*geneval")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("models/absent", "is no folder with a model_index.json; `git checkout` restores"),
        ("absent", "is no folder with a model_index.json; `git checkout` restores"),
        ("models", "is a folder without model_index.json or config.json"),
    ],
)
def test_absent_base_model_is_a_wrong_parameter(folder, tracker, capsys, stage, name, problem):
    write_params(folder, {**TINY, "policy.pretrained": name})
    assert main([stage]) == 2
    assert_error(capsys, f"policy.pretrained: {name} {problem}")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_flipped_byte_of_the_base_model_is_found_before_it_loads(folder, tracker, capsys, stage):
    weights = Path("models/tiny/transformer/diffusion_pytorch_model.safetensors")
    listed = json.loads(Path("models/tiny/manifest.json").read_text())["files"]
    expected = listed["transformer/diffusion_pytorch_model.safetensors"]["sha256"]
    flip_a_byte(weights)
    assert main([stage]) == 1
    assert_error(capsys, f"{weights} is damaged: expected sha256 {expected} of .*, found sha256")


def test_training_leaves_the_base_model_alone(folder, tracker):
    assert main(["train"]) == 0
    verify_manifest(Path("models/tiny"))


def test_a_run_that_another_process_trains_is_not_trained_twice(folder, tracker, monkeypatch, capsys):
    monkeypatch.setenv("SFGRPO_GRACE_S", "0.1")
    monkeypatch.setattr(training_run, "LOCK_MARGIN_S", 0.0)
    assert main(["train"]) == 0
    run = checkpoints(folder).parent
    with exclusive_lock(run_lock(run)):
        assert main(["train"]) == 1
    assert_error(capsys, f"another process trains run {run.name}; wait until it is done")
    assert main(["train"]) == 0


class Rising(Light):
    """Lightness, more with every call: each evaluation is better than the one before."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, images, prompts):
        self.num_calls += 1
        return super().__call__(images, prompts) + self.num_calls


def test_the_training_reward_selects_the_best_adapter_whatever_geneval_says(folder, monkeypatch):
    with inside(folder, Rising):
        monkeypatch.setitem(REWARDS, "geneval_correct", only_best(2))
        assert main(["train"]) == 0
        assert json.loads(Path("models/policy/training.json").read_text())["update"] == 3
