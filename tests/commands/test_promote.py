"""Promotion, rollback, recheck and sampling by command, on real versions in a real registry."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from sfgrpo.cli import main
from sfgrpo.commands import promote as command
from sfgrpo.commands import recheck as recheck_command
from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import RegistryError
from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.evaluation.evaluate import Evaluation, SamplingProtocol
from sfgrpo.geneval.scorer import asks_for_a_number
from sfgrpo.geneval.table import summarise
from sfgrpo.promotion import aliases, compare
from sfgrpo.promotion.aliases import CHAMPION, PREVIOUS
from sfgrpo.promotion.decision import DECISION_TAG, RECORD_TAG
from sfgrpo.promotion.evaluation import EvaluationSetup, measure_agreement
from sfgrpo.promotion.history import Promotion, append, experiment_of, read_history
from sfgrpo.prompts import write_prompts
from sfgrpo.registry import drawing
from sfgrpo.registry.drawing import PNG_SIGNATURE
from sfgrpo.registry.package import MANIFEST_TAG, Package
from sfgrpo.registry.register import TrainedAdapter, register_version
from sfgrpo.registry.versions import number_of_alias
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.types import TAGS
from tests.support.metrics_page import documented
from tests.support.registry import draw
from tests.support.stores import free_port, wait_for_answer
from tests.support.tiny import build_tiny_adapter, build_tiny_pipeline, make_tiny_policy, tiny_serving
from tests.support.tiny_run import TINY, write_params

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

PER_TASK = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A project with a registry, shared by the tests; each test has a model of its own."""

    folder: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def client(self) -> MlflowClient:
        return connect(self.uri)

    def register(self, model: str, adapter: int = 0) -> int:
        version = register_version(
            uri=self.uri,
            experiment="tests",
            registry=RegistryConfig(model_name=model, alias="challenger"),
            adapter=TrainedAdapter(
                folder=self.folder / f"{adapter}/adapter",
                metrics={"geneval/overall": 0.5},
                provenance={"git_commit": "c0ffee"},
                run_id=None,
            ),
            serving=tiny_serving(self.folder / "pipeline"),
            scratch=self.folder / ".scratch",
        )
        return version.version

    def aliases(self, model: str) -> tuple[int | None, int | None]:
        return number_of_alias(self.client, model, CHAMPION), number_of_alias(self.client, model, PREVIOUS)

    def tags(self, model: str, number: int) -> dict[str, str]:
        return dict(self.client.get_model_version(model, str(number)).tags)

    def files(self, model: str, number: int) -> Path:
        """Return the folder in the artifact store that holds a version."""
        source = self.client.get_model_version(model, str(number)).source
        return self.folder / "mlartifacts" / "models" / source.removeprefix("models:/") / "artifacts"

    def decision(self) -> dict[str, Any]:
        return json.loads((self.folder / "reports/promotion/decision.json").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("promoting")
    pipeline = build_tiny_pipeline(folder / "pipeline", blobs=True)
    for seed in (0, 1, 2):
        build_tiny_adapter(pipeline, folder / f"{seed}/adapter", seed)
    registry = Registry(folder=folder)
    write_params(
        folder,
        {
            **TINY,
            "reward.name": "geneval",
            "prompts.num_evaluation": dict.fromkeys(TAGS, PER_TASK),
            "promotion.num_resamples": 200,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prompts"]) == 0
    return registry


@pytest.fixture
def registry(project: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.uri)
    monkeypatch.setenv("SFGRPO_DEVICE", "cpu")
    yield project
    shutil.rmtree(project.folder / "reports", ignore_errors=True)
    assert not list((project.folder / ".scratch").glob("*")), "nothing is left behind"


def evaluation(
    setup: EvaluationSetup, *, correct: bool, likeness: float = 0.5, varied: bool = True, failing: str | None = None
) -> Evaluation:
    """Make up the evaluation of a model."""
    tags, num_images = [prompt.tag for prompt in setup.prompts], setup.protocol.images_per_prompt
    shape = (len(tags), num_images)
    verdicts = np.full(shape, correct)
    verdicts[[tag == failing for tag in tags]] = not correct
    thumbnails = np.zeros((*shape, 4, 4, 3), dtype=np.uint8)
    if varied:
        thumbnails += np.arange(num_images, dtype=np.uint8).reshape(-1, 1, 1, 1) * 100
    return Evaluation(
        images=np.zeros((len(setup.shown) * num_images, 4, 4, 3), dtype=np.uint8),
        seen=[None] * (len(setup.shown) * num_images),
        thumbnails_PGHWC=thumbnails,
        correct=verdicts,
        table=summarise(tags, verdicts),
        rewards_PG={"geneval": verdicts.astype(np.float32), "likeness": np.full(shape, likeness, np.float32)},
    )


def agreement(setup: EvaluationSetup, num_confirmed: int = 40) -> Agreement:
    """Make up the agreement of a model that is right in 40 images of the first prompt that asks for a number."""
    prompt = next(prompt for prompt in setup.prompts if asks_for_a_number(prompt))
    ranks = np.arange(60)[None]
    return Agreement.of([prompt], ranks < 40, ranks < num_confirmed)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Made-up evaluations of the models that would draw, the baseline first."""
    coming: list[dict[str, Any]] = []
    monkeypatch.setattr(compare, "evaluate", lambda policy, setup: evaluation(setup, **coming.pop(0)))
    monkeypatch.setattr(compare, "measure_agreement", lambda policy, setup: agreement(setup))
    monkeypatch.setattr(recheck_command, "evaluate", lambda policy, setup: evaluation(setup, **coming.pop(0)))
    return coming


WORSE, BETTER = {"correct": False}, {"correct": True}


def promote(verdicts: list[dict[str, Any]], model: str, *options: str, baseline=WORSE, candidate=BETTER) -> int:
    verdicts[:] = [baseline, candidate]
    return main(["promote", "--model", model, *options])


def test_candidate_draws_against_its_base_model_and_the_decision_is_kept_everywhere(registry, capsys):
    number = registry.register("drawn")
    assert main(["promote", "--model", "drawn"]) == 0
    decision, tags = registry.decision(), registry.tags("drawn", number)
    run = registry.client.get_run(decision["run_id"])
    assert (decision["baseline"], decision["baseline_version"], decision["version"]) == ("base model", None, number)
    assert decision["promoted"] == (tags["promotion/decision"] == "promoted") == (not decision["failed"])
    assert {key: float(tags[key]) for key in decision["metrics"] if key.startswith("promotion/")} == {
        key: value for key, value in decision["metrics"].items() if key.startswith("promotion/")
    }
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(decision["metrics"])
    assert run.data.params["promotion.seed"] == "4321"
    assert tags["promotion/run_id"] == run.info.run_id
    names = {file.path for file in registry.client.list_artifacts(run.info.run_id)}
    assert names >= {"decision.json", "report.md", "evaluation_prompts.jsonl", "images"}
    report = (registry.folder / "reports/promotion/report.md").read_text()
    assert "with other noise (seed 1234; here it is 4321)" in report
    with Image.open(registry.folder / "reports/promotion/samples.png") as grid:
        assert grid.size[0] > 300
    assert capsys.readouterr().out.startswith(decision["sentence"])


def test_better_candidate_becomes_champion_and_the_former_one_previous(registry, verdicts, capsys):
    first, second = registry.register("better"), registry.register("better", 1)
    assert promote(verdicts, "better", "--version", "1") == 0
    assert registry.aliases("better") == (first, None)
    assert "It is the first champion" in registry.decision()["sentence"]
    assert promote(verdicts, "better") == 0
    assert registry.aliases("better") == (second, first)
    assert registry.decision()["baseline_version"] == first
    assert registry.tags("better", second)["promotion/smoke_test"] == "passed"
    assert capsys.readouterr().out.endswith(f"version {second} of better is champion\n")


@pytest.mark.parametrize(
    ("gate", "baseline", "candidate"),
    [
        ("overall", BETTER, BETTER),
        ("tasks", {**WORSE, "failing": "colors"}, {**BETTER, "failing": "colors"}),
        ("held_out", {**WORSE, "likeness": 0.6}, BETTER),
        ("diversity", WORSE, {**BETTER, "varied": False}),
    ],
)
def test_candidate_that_fails_a_gate_moves_nothing(registry, verdicts, gate, baseline, candidate):
    model = f"refused_{gate}"
    registry.register(model)
    assert promote(verdicts, model, baseline=baseline, candidate=candidate) == 0
    decision = registry.decision()
    assert (decision["promoted"], decision["failed"]) == (False, [gate])
    assert registry.tags(model, 1)["promotion/failed"] == gate
    assert registry.aliases(model) == (None, None)


def test_champion_is_not_compared_with_itself(registry, verdicts, capsys):
    registry.register("itself")
    promote(verdicts, "itself")
    assert main(["promote", "--model", "itself"]) == 0
    assert (registry.decision()["promoted"], registry.decision()["run_id"]) == (False, None)
    assert "Version 1 of itself is champion already." in capsys.readouterr().out


def test_decision_moves_nothing_until_it_is_applied(registry, verdicts, capsys):
    registry.register("approved")
    assert promote(verdicts, "approved", "--judge-only") == 0
    run_id = registry.decision()["run_id"]
    assert registry.aliases("approved") == (None, None)
    assert f"promote --apply {run_id}` makes it champion" in capsys.readouterr().out
    assert main(["promote", "--apply", run_id]) == 0
    assert registry.aliases("approved") == (1, None)
    assert main(["promote", "--apply", run_id]) == 0
    assert len(read_history(registry.client, registry.uri, "approved").entries) == 1
    assert "is champion already, by this decision" in capsys.readouterr().out


def test_decision_against_another_champion_is_not_applied(registry, verdicts, capsys):
    registry.register("outdated")
    registry.register("outdated", 1)
    promote(verdicts, "outdated", "--judge-only")
    late = registry.decision()["run_id"]
    promote(verdicts, "outdated", "--version", "1")
    assert main(["promote", "--apply", late]) == 1
    assert (
        f"the champion of outdated has changed since MLflow run {late} was decided; compare again by"
        in capsys.readouterr().err
    )
    assert registry.aliases("outdated") == (1, None)


def test_refusal_is_not_applied(registry, verdicts, capsys):
    registry.register("unwanted")
    promote(verdicts, "unwanted", candidate=WORSE)
    assert main(["promote", "--apply", registry.decision()["run_id"]]) == 1
    assert "decided not to promote version 1" in capsys.readouterr().err


def test_run_without_a_decision_is_not_applied(registry, capsys):
    assert main(["promote", "--apply", "f" * 32]) == 1
    assert f"MLflow run {'f' * 32} holds no decision.json of a promotion" in capsys.readouterr().err


def test_decision_is_about_one_version(capsys):
    assert main(["promote", "--apply", "r", "--version", "2"]) == 2
    assert "--apply RUN is about the version that was compared; leave --model and --version" in capsys.readouterr().err


def test_candidate_that_hides_objects_from_the_detector_is_not_promoted(registry, verdicts, monkeypatch):
    registry.register("flattering")
    found = [40, 20]
    monkeypatch.setattr(compare, "measure_agreement", lambda policy, setup: agreement(setup, found.pop(0)))
    assert promote(verdicts, "flattering") == 0
    assert registry.aliases("flattering") == (None, None)
    assert registry.decision()["failed"] == ["agreement"]
    report = (registry.folder / "reports/promotion/report.md").read_text()
    assert "but an independent counter disputes too many of its correct counts, beyond chance." in report
    assert "| Agreement (share) | 0.500 |" in report


def test_agreement_is_measured_on_images_of_its_own(registry):
    setup = EvaluationSetup(
        prompts=[prompts[0] for prompts in all_prompts().values()],
        protocol=SamplingProtocol(images_per_prompt=2, num_steps=1, guidance_scale=1.0, seed=0, micro_batch_size=8),
        rewards=(),
        reward_configs=(),
        agreement_images=5,
    )
    policy = make_tiny_policy()
    measured = measure_agreement(policy, setup)
    assert measured is not None and measured.confirmed_PG.shape == (1, 5)
    pairs = [prompt for prompt in setup.prompts if prompt.tag == "two_object"]
    assert measure_agreement(policy, dataclasses.replace(setup, prompts=pairs)) is None


def test_every_metric_of_a_promotion_has_a_line_on_the_page_of_metrics(registry, verdicts):
    registry.register("documented")
    promote(verdicts, "documented", candidate=WORSE)
    keys = documented()
    lines = {key: key.removesuffix("_lower").removesuffix("_upper") for key in registry.decision()["metrics"]}
    placed = {key: re.sub(r"/gate/\w+$", "/gate/<gate>", line) for key, line in lines.items()}
    placed = {key: re.sub(rf"promotion/({'|'.join(TAGS)})$", "promotion/<task>", line) for key, line in placed.items()}
    placed = {key: re.sub(r"time/promotion_\w+_s", "time/promotion_<part>_s", line) for key, line in placed.items()}
    assert {key: line for key, line in placed.items() if line not in keys} == {}


def test_promotion_that_another_overtakes_is_refused(registry, verdicts, monkeypatch, capsys):
    registry.register("overtaken")
    registry.register("overtaken", 1)

    def overtaken(*arguments: Any) -> Any:
        history = read_history(registry.client, registry.uri, "overtaken")
        append(registry.client, history, Promotion(action="promotion", version=1, over=None, run_id=None))
        return compare_versions(*arguments)

    compare_versions = command.compare_versions
    monkeypatch.setattr(command, "compare_versions", overtaken)
    assert promote(verdicts, "overtaken") == 1
    assert "another promotion or rollback of overtaken was decided meanwhile; run it again" in capsys.readouterr().err
    assert [entry.version for entry in read_history(registry.client, registry.uri, "overtaken").entries] == [1]


def test_version_that_cannot_draw_is_not_promoted(registry, verdicts, monkeypatch, capsys):
    for adapter in (0, 1):
        registry.register("broken", adapter)
    promote(verdicts, "broken", "--version", "1")
    monkeypatch.setattr(drawing, "draw", lambda *arguments, **options: [b"GIF89a.."])
    assert promote(verdicts, "broken") == 1
    assert "models:/broken/2 returned b'GIF89a..' instead of a PNG file" in capsys.readouterr().err
    assert registry.aliases("broken") == (1, None)
    assert len(read_history(registry.client, registry.uri, "broken").entries) == 1
    assert registry.tags("broken", 2)["promotion/smoke_test"] == "failed"


def test_promotion_that_died_before_the_aliases_moved_is_finished_by_the_next_call(registry, verdicts, monkeypatch):
    registry.register("crashed")
    with monkeypatch.context() as patch:
        patch.setattr(aliases, "sync_aliases", lambda *arguments: (_ for _ in ()).throw(SystemExit(137)))
        with pytest.raises(SystemExit):
            promote(verdicts, "crashed")
    assert registry.aliases("crashed") == (None, None)
    assert main(["promote", "--apply", registry.decision()["run_id"]]) == 0
    assert registry.aliases("crashed") == (1, None)
    assert registry.tags("crashed", 1)["promotion/smoke_test"] == "passed"


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def replace_with_its_manifest(files: Path) -> None:
    weights = files / "artifacts/adapter/pytorch_lora_weights.safetensors"
    manifest = json.loads((files / "manifest.json").read_text())
    damage(weights)
    manifest["files"]["artifacts/adapter/pytorch_lora_weights.safetensors"]["sha256"] = sha256_of_file(weights)
    (files / "manifest.json").write_text(json.dumps(manifest))


TAMPERING = {
    "adapter": (
        lambda files: damage(files / "artifacts/adapter/pytorch_lora_weights.safetensors"),
        r"artifacts/adapter/pytorch_lora_weights.safetensors: expected sha256 \w+ of \d+ bytes, found sha256",
    ),
    "base pipeline": (
        lambda files: damage(files / "artifacts/pipeline/transformer/diffusion_pytorch_model.safetensors"),
        "artifacts/pipeline/transformer/diffusion_pytorch_model.safetensors: expected",
    ),
    "serving code": (
        lambda files: (files / "serving.py").write_text("import os\n"),
        "serving.py: expected sha256",
    ),
    "missing file": (
        lambda files: (files / "artifacts/pipeline/model_index.json").unlink(),
        "model_index.json: expected sha256 .*, found no file",
    ),
    "file too many": (
        lambda files: (files / "artifacts/adapter/more.json").write_text("{}"),
        "artifacts/adapter/more.json: expected no file",
    ),
    "manifest": (replace_with_its_manifest, "manifest.json: expected sha256"),
    "no manifest": (lambda files: (files / "manifest.json").unlink(), "manifest.json: expected .*, found no file"),
    "pickle": (
        lambda files: (files / "artifacts/adapter/pytorch_lora_weights.bin").write_bytes(b"\x80\x04N."),
        "artifacts/adapter/pytorch_lora_weights.bin: expected no file",
    ),
    "no files": (lambda files: shutil.rmtree(files), "manifest.json: expected .*, found no file"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_version_that_is_not_what_was_registered_is_refused(registry, capsys, case):
    model = f"tampered_{case.replace(' ', '_')}"
    registry.register(model)
    tamper, complaint = TAMPERING[case]
    tamper(registry.files(model, 1))
    assert main(["promote", "--model", model]) == 1
    assert re.search(complaint, capsys.readouterr().err)
    assert registry.aliases(model) == (None, None)
    experiment = registry.client.get_experiment_by_name(experiment_of(model))
    assert [run.info.status for run in registry.client.search_runs([experiment.experiment_id])] == ["FAILED"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tampered:
    """A model of two champions, the first of which got other serving code; a decision to promote it waits."""

    model: str
    canary: Path
    """Appears if the code runs."""
    decision: str


def tamper(registry: Registry, model: str, number: int) -> Path:
    canary = registry.folder / f"{model} was run"
    (registry.files(model, number) / "serving.py").write_text(f"open({str(canary)!r}, 'w')\n")
    return canary


@pytest.fixture
def tampered(registry: Registry, verdicts: list[dict[str, Any]]) -> Tampered:
    model = "twice"
    if registry.client.search_registered_models(f"name = '{model}'"):
        run = registry.client.search_runs(
            [registry.client.get_experiment_by_name(experiment_of(model)).experiment_id],
            f"tags.`{DECISION_TAG}` != ''",
        )[-1]
        return Tampered(model=model, canary=registry.folder / f"{model} was run", decision=run.info.run_id)
    for adapter in (0, 1):
        registry.register(model, adapter)
    promote(verdicts, model, "--version", "1", "--judge-only")
    decision = registry.decision()["run_id"]
    for number, over in ((1, None), (2, 1)):
        history = read_history(registry.client, registry.uri, model)
        append(registry.client, history, Promotion(action="promotion", version=number, over=over, run_id=None))
    aliases.sync_aliases(registry.client, registry.uri, model)
    # As if nothing had been promoted since.
    run = registry.client.get_run(decision)
    path = Path(run.info.artifact_uri.removeprefix("file://"), "decision.json")
    path.write_text(path.read_text().replace('"num_entries": 0', '"num_entries": 2'))
    registry.client.set_tag(decision, DECISION_TAG, sha256_of_file(path))
    return Tampered(model=model, canary=tamper(registry, model, 1), decision=decision)


LOADS = {
    "rollback": lambda model, decision: ["rollback", "--model", model],
    "promote": lambda model, decision: ["promote", "--model", model, "--version", "1"],
    "apply": lambda model, decision: ["promote", "--apply", decision],
    "sample": lambda model, decision: ["sample", "--model", f"models:/{model}/1", "a ring"],
    "sample_by_alias": lambda model, decision: ["sample", "--model", f"models:/{model}@previous", "a ring"],
}


@pytest.mark.parametrize("command", LOADS)
def test_no_command_runs_tampered_code_or_moves_an_alias_to_it(registry, tampered, capsys, command):
    assert main(LOADS[command](tampered.model, tampered.decision)) == 1
    error = capsys.readouterr().err.strip()
    assert f"models:/{tampered.model}/1 is not what was registered" in error and "serving.py: expected sha256" in error
    assert len(error.splitlines()) == 1
    assert registry.aliases(tampered.model) == (2, 1)
    assert len(read_history(registry.client, registry.uri, tampered.model).entries) == 2
    assert not tampered.canary.exists()


def test_registering_a_version_again_does_not_run_its_tampered_code(registry):
    registry.register("again")
    registry.register("again", 1)
    canary = tamper(registry, "again", 1)
    with pytest.raises(RegistryError, match=r"models:/again/1 is not what was registered.*serving.py"):
        registry.register("again")
    assert number_of_alias(registry.client, "again", "challenger") == 2
    assert not canary.exists()


def test_tampered_champion_is_neither_compared_nor_replaced_nor_rechecked(registry, verdicts, capsys):
    for adapter in (0, 1):
        registry.register("poisoned", adapter)
    promote(verdicts, "poisoned", "--version", "1")
    canary = tamper(registry, "poisoned", 1)
    for name in ("promote", "recheck"):
        assert main([name, "--model", "poisoned"]) == 1
        assert "models:/poisoned/1 is not what was registered" in capsys.readouterr().err
    assert registry.aliases("poisoned") == (1, None)
    assert not canary.exists()


def test_store_that_changes_after_the_check_changes_nothing(registry, monkeypatch):
    registry.register("raced")
    before = draw(registry.uri, "models:/raced/1", ["a photo of a ring"])
    load, modes = drawing.draw, []

    def tampered_meanwhile(package: Package, *arguments: Any, **options: Any) -> list[bytes]:
        canaries.append(tamper(registry, "raced", 1))
        modes.append(stat.S_IMODE(package.folder.stat().st_mode))
        return load(package, *arguments, **options)

    canaries: list[Path] = []
    monkeypatch.setattr(drawing, "draw", tampered_meanwhile)
    assert draw(registry.uri, "models:/raced/1", ["a photo of a ring"]) == before
    assert modes == [0o700]
    assert not canaries[0].exists()


@pytest.mark.parametrize("target", ["/etc/hostname", "manifest.json", "artifacts"])
def test_link_in_the_store_is_refused(registry, target):
    model = f"linked_{Path(target).stem}"
    registry.register(model)
    (registry.files(model, 1) / "more.json").symlink_to(target)
    with pytest.raises(RegistryError, match=f"models:/{model}/1"):
        draw(registry.uri, f"models:/{model}/1", ["a photo of a ring"])


def test_decision_that_was_changed_in_the_artifact_store_is_not_applied(registry, verdicts, capsys):
    registry.register("forged")
    promote(verdicts, "forged", candidate=WORSE)
    decision = registry.decision()["run_id"]
    run = registry.client.get_run(decision)
    path = Path(run.info.artifact_uri.removeprefix("file://"), "decision.json")
    path.write_text(path.read_text().replace('"promoted": false', '"promoted": true'))
    assert main(["promote", "--apply", decision]) == 1
    assert f"decision.json of MLflow run {decision} is not what was decided" in capsys.readouterr().err
    assert registry.aliases("forged") == (None, None)


def test_version_without_the_digest_of_its_manifest_is_refused(registry, capsys):
    registry.register("old")
    registry.client.delete_model_version_tag("old", "1", MANIFEST_TAG)
    assert main(["promote", "--model", "old"]) == 1
    assert "models:/old/1 was registered without a manifest" in capsys.readouterr().err


def test_rollback_makes_the_former_champion_champion_again(registry, verdicts, capsys):
    for adapter in (0, 1):
        registry.register("back", adapter)
        promote(verdicts, "back")
    assert main(["rollback", "--model", "back"]) == 0
    assert registry.aliases("back") == (1, None)
    assert capsys.readouterr().out.endswith("version 2 of back is rolled back; version 1 is champion again\n")
    assert main(["rollback", "--model", "back"]) == 1
    assert "version 1 of back is its first champion; there is none before it" in capsys.readouterr().err


def test_rollback_skips_versions_that_were_deleted(registry, verdicts):
    for adapter in (0, 1, 2):
        registry.register("gaps", adapter)
        promote(verdicts, "gaps")
    registry.client.delete_model_version("gaps", "2")
    assert main(["rollback", "--model", "gaps"]) == 0
    assert registry.aliases("gaps") == (1, None)


def test_rollback_without_a_champion_is_refused(registry, capsys):
    registry.register("none")
    assert main(["rollback", "--model", "none"]) == 1
    assert "none has no champion by promotion, so there is nothing to roll back" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["rollback"], ["recheck"]])
def test_unknown_model_is_refused_with_the_known_ones(registry, capsys, command):
    registry.register("known")
    assert main([*command, "--model", "unknown"]) == 1
    assert re.search("no model 'unknown' is registered; registered models are .*known", capsys.readouterr().err)


def recheck(registry: Registry, model: str) -> dict[str, Any]:
    assert main(["recheck", "--model", model]) == 0
    return json.loads((registry.folder / "reports/recheck.json").read_text())


def test_champion_that_draws_as_before_has_not_drifted(registry):
    registry.register("steady")
    assert main(["promote", "--model", "steady", "--judge-only"]) == 0
    history = read_history(registry.client, registry.uri, "steady")
    append(registry.client, history, Promotion(action="promotion", version=1, over=None, run_id=None))
    found = recheck(registry, "steady")
    recorded = json.loads(registry.tags("steady", 1)[RECORD_TAG])
    assert (found["drifted"], found["reasons"]) == (False, [])
    assert found["metrics"] == recorded["metrics"]
    assert found["table"].startswith("| Metric | Recorded | Today |")


def test_champion_that_draws_differently_has_drifted(registry, verdicts, capsys):
    registry.register("drifting")
    promote(verdicts, "drifting")
    verdicts[:] = [{**BETTER, "failing": "colors", "likeness": 0.4}]
    found = recheck(registry, "drifting")
    assert found["drifted"]
    assert [reason.split(" was ")[0] for reason in found["reasons"]] == [
        "Overall",
        "Colors",
        "Reward geneval",
        "Reward likeness",
    ]
    assert "version 1 of drifting has drifted: Overall was 1.000 and is 0.833" in capsys.readouterr().out
    experiment = registry.client.get_experiment_by_name(experiment_of("drifting"))
    runs = registry.client.search_runs([experiment.experiment_id], "metrics.`recheck/drifted` = 1")
    assert [run.data.params["version"] for run in runs] == ["1"]


def test_recheck_is_on_the_prompts_of_the_promotion_whatever_the_folder_holds(registry, verdicts, monkeypatch):
    registry.register("prompts")
    promote(verdicts, "prompts")
    seen = []
    monkeypatch.setattr(
        recheck_command, "evaluate", lambda policy, setup: seen.append(setup.prompts) or evaluation(setup, **BETTER)
    )
    kept = registry.folder / "data/prompts/evaluation.jsonl"
    text = kept.read_text()
    kept.unlink()
    try:
        assert not recheck(registry, "prompts")["drifted"]
    finally:
        kept.write_text(text)
    assert len(seen[0]) == PER_TASK * len(TAGS)


def test_prompts_that_are_not_the_recorded_ones_are_refused(registry, verdicts, capsys):
    registry.register("swapped")
    promote(verdicts, "swapped")
    run = registry.client.get_run(registry.decision()["run_id"])
    path = Path(run.info.artifact_uri.removeprefix("file://"), "evaluation_prompts.jsonl")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert main(["recheck", "--model", "swapped"]) == 1
    assert "evaluation_prompts.jsonl is damaged: expected sha256" in capsys.readouterr().err


def test_model_without_a_champion_has_not_drifted(registry, capsys):
    registry.register("vacant")
    assert recheck(registry, "vacant") == {
        "drifted": False,
        "reasons": ["vacant has no champion, so there is nothing to check"],
        "table": "",
        "metrics": {},
    }


def test_champion_that_was_never_evaluated_cannot_be_checked(registry, capsys):
    registry.register("by_hand")
    history = read_history(registry.client, registry.uri, "by_hand")
    append(registry.client, history, Promotion(action="promotion", version=1, over=None, run_id=None))
    assert main(["recheck", "--model", "by_hand"]) == 1
    assert "models:/by_hand/1 was never evaluated by `python -m sfgrpo promote`" in capsys.readouterr().err


def test_alias_that_was_set_by_hand_makes_no_champion(registry, verdicts, capsys):
    registry.register("crowned")
    registry.client.set_registered_model_alias("crowned", CHAMPION, "1")
    assert recheck(registry, "crowned")["reasons"] == ["crowned has no champion, so there is nothing to check"]
    assert registry.aliases("crowned") == (None, None)
    registry.client.set_registered_model_alias("crowned", CHAMPION, "1")
    assert promote(verdicts, "crowned", candidate=WORSE) == 0
    assert registry.decision()["baseline"] == "base model"
    assert registry.aliases("crowned") == (None, None)


@pytest.mark.parametrize("command", ["register", "promote", "rollback", "recheck"])
@pytest.mark.parametrize("alias", ["champion", "previous", "Champion", "PREVIOUS", "ch\u00e2mpion", "\uff43hampion"])
def test_aliases_of_promotion_are_refused_as_parameters(registry, tmp_path, monkeypatch, capsys, command, alias):
    write_params(tmp_path, {**TINY, "reward.name": "geneval", "registry.alias": alias})
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert f"registry.alias: {alias!r} is moved by promotion alone" in capsys.readouterr().err


def test_missing_prompts_are_reported(registry, tmp_path, monkeypatch, capsys):
    registry.register("promptless")
    shutil.copy(registry.folder / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["promote", "--model", "promptless"]) == 2
    assert "data/prompts/evaluation.jsonl does not exist; write it by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "validation", "evaluation", "complaint"),
    [
        ([], [], [0, 1, 0], "evaluation.jsonl:3: 1 of 3 evaluation prompts repeat an earlier one"),
        ([5, 1], [], [0, 1], "train.jsonl:2: 1 of 2 training prompts are evaluated on"),
        ([5], [4, 1], [0, 1], "validation.jsonl:2: 1 of 2 validation prompts are evaluated on"),
    ],
)
def test_prompts_that_do_not_count_once_are_refused_before_a_model_draws(
    registry, tmp_path, monkeypatch, capsys, training, validation, evaluation, complaint
):
    registry.register("repeated")
    shutil.copy(registry.folder / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    space = all_prompts()["single_object"]
    for name, chosen in (("train", training), ("validation", validation), ("evaluation", evaluation)):
        if chosen:
            write_prompts(Path(f"data/prompts/{name}.jsonl"), [space[index] for index in chosen])
    monkeypatch.setattr(compare, "load_policy", lambda *_: pytest.fail("the model is loaded"))
    assert main(["promote", "--model", "repeated"]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"promotion.seed": 1234}, "promotion.seed: 1234 is evaluation.seed, .* use another, for example 1235"),
        ({"promotion.held_out.name": "geneval"}, "promotion.held_out: geneval is the reward that is trained on"),
        ({"promotion.held_out.name": "beauty"}, "promotion.held_out: reward 'beauty' is unknown; allowed are"),
        ({"evaluation.images_per_prompt": 1}, "evaluation.images_per_prompt: 1 image of a prompt shows no diversity"),
        ({"promotion.num_resamples": 119}, "promotion.num_resamples: 119 leave no resample .* use 120 or more"),
        ({"promotion.error_rate": 0.5}, "promotion.error_rate: 0.5 is not less than 0.5"),
        ({"promotion.min_again": 0.1}, "promotion.min_again: unknown key; .*did you mean min_gain"),
    ],
)
def test_wrong_parameters_are_refused(registry, tmp_path, monkeypatch, capsys, changes, complaint):
    registry.register("wrong")
    write_params(tmp_path, {**TINY, "reward.name": "geneval", **changes})
    shutil.copytree(registry.folder / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["promote", "--model", "wrong"]) == 2
    assert re.search(complaint, capsys.readouterr().err)


def test_sample_is_drawn_by_the_version_that_the_alias_points_to(registry, capsys):
    registry.register("painter")
    command = [
        "sample",
        "--model",
        "models:/painter@challenger",
        "a photo of a ring",
        "--seed",
        "3",
        "--out",
        "a/b.png",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out == "a/b.png by version 1 of painter\n"
    content = (registry.folder / "a/b.png").read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    assert content == draw(registry.uri, "models:/painter/1", ["a photo of a ring"], seed=3)[0]
    assert main([*command, "--steps", "1", "--guidance", "3"]) == 0
    assert (registry.folder / "a/b.png").read_bytes() != content


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (
            ["--model", "models:/sketcher@champion", "a ring"],
            1,
            r"models:/sketcher@champion does not exist; sketcher has the aliases @challenger \(version 1\) and the "
            "versions 1",
        ),
        (["--model", "models:/sketcher/7", "a ring"], 1, "models:/sketcher/7 does not exist; sketcher has"),
        (["--model", "models:/scribbler@x", "a ring"], 1, "models:/scribbler@x does not exist; registered models are"),
        (["--model", "sketcher", "a ring"], 2, "'sketcher' is no model; give models:/NAME@ALIAS or models:/NAME/NUM"),
        (["--model", "models:/sketcher/1", " "], 2, "the prompt is empty"),
        (["--model", "models:/sketcher/1", "a ring", "--out", "a.jpg"], 2, "--out a.jpg is no PNG file"),
    ],
)
def test_sample_that_cannot_be_drawn_is_refused(registry, capsys, arguments, status, complaint):
    if not registry.client.search_registered_models("name = 'sketcher'"):
        registry.register("sketcher")
    assert main(["sample", *arguments]) == status
    assert re.search(complaint, capsys.readouterr().err)
    assert not (registry.folder / "sample.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a ring", "--steps", "11"], "models:/limited/1: num_inference_steps 11 is not an integer in 1..10"),
        (["a ring", "--guidance", "11"], "models:/limited/1: guidance_scale 11.0 is not a number in 0..10.0"),
        (["ring " * 20], "models:/limited/1: prompt 0 has 22 tokens and the text encoder takes 12; shorten it"),
        (["a" * 20_000], "models:/limited/1: prompt 0 has 20000 characters instead of 10000 at most"),
    ],
)
def test_sample_beyond_the_limits_of_the_version_is_refused(registry, capsys, arguments, complaint):
    if not registry.client.search_registered_models("name = 'limited'"):
        registry.register("limited")
        capsys.readouterr()
    assert main(["sample", "--model", "models:/limited/1", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and error.startswith("error: ")


def test_download_is_a_verified_folder_or_none(registry, tmp_path, capsys):
    registry.register("fetched")
    command = ["download", "--model", "models:/fetched@challenger", "--out", str(tmp_path / "copy")]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path}/copy is version 1 of fetched, as it was registered\n"
    assert (tmp_path / "copy/MLmodel").exists()
    assert main(command) == 2
    assert f"--out {tmp_path}/copy exists already; give the name of a new folder" in capsys.readouterr().err
    tamper(registry, "fetched", 1)
    assert main([*command[:-1], str(tmp_path / "other")]) == 1
    assert "models:/fetched/1 is not what was registered" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_version_draws_the_same_in_plain_diffusers(registry):
    import torch
    from diffusers import DiffusionPipeline

    registry.register("plain", 1)
    assert main(["download", "--model", "models:/plain/1", "--out", "downloaded"]) == 0
    pipeline = DiffusionPipeline.from_pretrained("downloaded/artifacts/pipeline", text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights("downloaded/artifacts/adapter")
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "max_sequence_length": 0}
    image = pipeline("a photo of a ring", generator=torch.Generator().manual_seed(5), **options).images[0]
    (served,) = draw(registry.uri, "models:/plain/1", ["a photo of a ring"], seed=5)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(served))))


@pytest.mark.slow
def test_served_version_answers_with_png_bytes(registry):
    registry.register("served")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@challenger", "-p", str(port)]
    with (registry.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local"],
            # It starts uvicorn by name.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/ping", server)
        question = {"inputs": ["a photo of a ring"], "params": {"seed": 4}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (row,) = json.load(answer)["predictions"]
        assert base64.b64decode(row["png"]) == draw(registry.uri, "models:/served/1", ["a photo of a ring"], seed=4)[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_shape_of_the_adapter_comes_from_the_version_and_not_from_the_parameters(registry, tmp_path):
    registry.register("shape")
    write_params(tmp_path, {**TINY, "reward.name": "geneval", "policy.lora_rank": 7})
    assert main(["promote", "--model", "shape", "--judge-only", "--params", str(tmp_path / "params.yaml")]) == 0
    assert registry.decision()["version"] == 1
