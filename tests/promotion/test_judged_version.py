"""Versions are compared, promoted and rechecked as what their tags, files and records name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import AdapterError, MismatchError
from sfgrpo.policies import adapter as adapters
from sfgrpo.policies.adapter import Base, read_adapter
from sfgrpo.promotion.decision import RECORD_TAG
from sfgrpo.promotion.evaluation import JudgedVersion, download_judged
from sfgrpo.promotion.history import Promotion, append, read_history
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.registry.register import TrainedAdapter, register_version
from sfgrpo.registry.versions import Version, find_version
from sfgrpo.runtime.manifest import model_digest
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.types import TAGS
from tests.support.tiny import build_tiny_pipeline, disturb, make_tiny_policy, tiny_serving
from tests.support.tiny_run import TINY, write_params

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

MODEL = "judged"
ADAPTERS = {"intact": {}, "of another base": {"base": Base(name="elsewhere", revision="sha256:ab")}, "zero": {}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A project with one version for every adapter."""

    folder: Path
    numbers: dict[str, int]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def version(self, adapter: str = "intact", **tags: str) -> Version:
        """Look a version up, as if it had other tags too."""
        found = find_version(connect(self.uri), f"models:/{MODEL}/{self.numbers[adapter]}")
        return dataclasses.replace(found, tags={**found.tags, **tags})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder, numbers = tmp_path_factory.mktemp("judged"), {}
    registry = Registry(folder=folder, numbers=numbers)
    build_tiny_pipeline(folder / "pipeline", blobs=True)
    write_params(
        folder,
        {**TINY, "reward.name": "geneval", "prompts.num_evaluation": dict.fromkeys(TAGS, 1)}
        | {"promotion.num_resamples": 200, "registry.model_name": MODEL},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prompts"]) == 0
        # As releases did that registered everything.
        patch.setattr(adapters, "read_effective_adapter", read_adapter)
        for name, options in ADAPTERS.items():
            policy = make_tiny_policy(**options)
            if name != "zero":
                disturb(policy)
            (folder / name).mkdir()
            policy.save_adapter(folder / name)
            numbers[name] = register_version(
                uri=registry.uri,
                scratch=folder / ".scratch",
                experiment="tests",
                registry=RegistryConfig(model_name=MODEL, alias="challenger"),
                adapter=TrainedAdapter(
                    folder=folder / name, metrics={}, provenance={"git_commit": "c0ffee"}, run_id=None
                ),
                serving=tiny_serving(folder / "pipeline"),
            ).version
    return registry


@pytest.fixture
def registry(project: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.uri)
    monkeypatch.setenv("SFGRPO_DEVICE", "cpu")
    yield project
    for key in ("evaluation_prompts_sha256", RECORD_TAG):
        if key in project.version().tags:
            connect(project.uri).delete_model_version_tag(MODEL, str(project.numbers["intact"]), key)


def judged(registry: Registry, folder: Path, adapter: str = "intact", **tags: str) -> JudgedVersion:
    return download_judged(registry.version(adapter, **tags), folder / "version")


def test_downloaded_version_is_what_its_tags_name(registry, tmp_path):
    base = f"sha256:{model_digest(registry.folder / 'pipeline')}"
    found = judged(registry, tmp_path, base_revision=base)
    assert found.adapter.sha256 == registry.version().tags["adapter_sha256"]
    assert (found.base.revision, found.policy.lora_alpha) == (base, 4)


@pytest.mark.parametrize("tag", ["adapter_sha256", "base_revision"])
def test_version_with_the_tag_of_something_else_is_refused(registry, tmp_path, tag):
    with pytest.raises(MismatchError, match=rf"models:/judged/\d+ has the tag {tag} ab, and its files are of"):
        judged(registry, tmp_path, **{tag: "ab"})


def test_version_whose_adapter_is_of_another_base_is_refused(registry, tmp_path):
    with pytest.raises(AdapterError, match=r"was trained on elsewhere \(sha256:ab\) and the base model is"):
        judged(registry, tmp_path, "of another base")


def test_version_that_changes_nothing_is_refused_though_an_earlier_release_registered_it(registry, tmp_path):
    with pytest.raises(
        AdapterError, match=r"changes nothing, .*; register an intact adapter instead of models:/judged"
    ):
        judged(registry, tmp_path, "zero")


def promote(registry: Registry, *options: str) -> int:
    return main(["promote", "--version", str(registry.numbers["intact"]), "--judge-only", *options])


def test_decision_report_record_and_run_name_what_was_compared(registry, tmp_path):
    assert promote(registry) == 0
    version = registry.version()
    decision = json.loads((registry.folder / "reports/promotion/decision.json").read_text())
    candidate, baseline = decision["evaluated"]["candidate"], decision["evaluated"]["base model"]
    assert candidate["adapter_sha256"] == version.tags["adapter_sha256"]
    assert baseline == {**candidate, "adapter_sha256": "none"}
    assert candidate["base_revision"] == f"sha256:{model_digest(registry.folder / 'pipeline')}"
    assert candidate["prompts_sha256"] == prompts_digest(read_prompts(Path("data/prompts/evaluation.jsonl")))
    record = json.loads(version.tags[RECORD_TAG])
    assert (record["adapter_sha256"], record["base_revision"]) == (
        candidate["adapter_sha256"],
        candidate["base_revision"],
    )
    run = connect(registry.uri).get_run(decision["run_id"])
    assert run.data.params["adapter_sha256"] == candidate["adapter_sha256"]
    report = (registry.folder / "reports/promotion/report.md").read_text()
    assert f"candidate: Adapter {candidate['adapter_sha256'][:12]}, base " in report


def test_candidate_is_not_compared_on_prompts_that_it_may_have_been_trained_on(registry, capsys):
    number = str(registry.numbers["intact"])
    connect(registry.uri).set_model_version_tag(MODEL, number, "evaluation_prompts_sha256", "ab")
    assert promote(registry) == 2
    assert "kept out the prompts ab and may have used others" in capsys.readouterr().err


def test_candidate_of_these_prompts_is_compared(registry):
    digest = prompts_digest(read_prompts(Path("data/prompts/evaluation.jsonl")))
    number = str(registry.numbers["intact"])
    connect(registry.uri).set_model_version_tag(MODEL, number, "evaluation_prompts_sha256", digest)
    assert promote(registry) == 0


def test_files_of_another_evaluation_are_refused(registry, tmp_path):
    found = judged(registry, tmp_path)
    found.require_subject_of({"adapter_sha256": found.adapter.sha256, "base_revision": found.base.revision}, "this")
    found.require_subject_of({}, "one of an earlier release")
    for name in ("adapter_sha256", "base_revision"):
        with pytest.raises(MismatchError, match=rf"the record is of {name} ab, and models:/judged/\d+ has .* again by"):
            found.require_subject_of({name: "ab"}, "the record")


def test_champion_is_not_rechecked_by_the_record_of_another_adapter(registry, capsys):
    assert promote(registry) == 0
    client, number = connect(registry.uri), str(registry.numbers["intact"])
    record = json.loads(registry.version().tags[RECORD_TAG]) | {"adapter_sha256": "ab"}
    client.set_model_version_tag(MODEL, number, RECORD_TAG, json.dumps(record))
    history = read_history(client, registry.uri, MODEL)
    append(client, history, Promotion(action="promotion", version=int(number), over=None, run_id=None))
    assert main(["recheck"]) == 2
    assert "is of adapter_sha256 ab, and models:/judged/" in capsys.readouterr().err
