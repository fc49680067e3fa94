"""A checkout that is moved or copied keeps its registry: the versions draw from where they are now."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.config.schema import RegistryConfig
from sfgrpo.registry.register import TrainedAdapter, register_version
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.tracking.moved import ADDRESSES
from tests.support.tiny import build_tiny_adapter, build_tiny_pipeline, tiny_serving

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store and one version, whose name needs quoting in an address."""
    folder = tmp_path_factory.mktemp("store") / "first home"
    folder.mkdir()
    pipeline = build_tiny_pipeline(folder / "pipeline")
    build_tiny_adapter(pipeline, folder / "adapter")
    register_version(
        f"sqlite:///{folder / 'mlflow.db'}",
        "tests",
        RegistryConfig(model_name="tiny", alias="challenger"),
        TrainedAdapter(folder=folder / "adapter", metrics={}, provenance={"git_commit": "c0ffee"}, run_id=None),
        tiny_serving(folder / "pipeline"),
        folder / ".scratch",
    )
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of that folder, in which commands work on its own store."""
    folder = tmp_path / "second home"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return folder


def addresses(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        return [
            str(address)
            for table, column in ADDRESSES
            for (address,) in connection.execute(f"SELECT {column} FROM {table}")
        ]


def sample() -> int:
    return main(["sample", "a red circle", "--model", "models:/tiny@challenger", "--out", "sample.png"])


def test_version_of_a_moved_checkout_draws_after_the_command_that_the_error_names(home, copy, capsys):
    hidden = home.rename(home.with_name("away"))
    try:
        assert sample() == 2
        told = capsys.readouterr().err
        assert f"recorded below {home}/mlartifacts, not beside it; `python -m sfgrpo relocate`" in told
        assert main(["relocate"]) == 0
        assert f"records of {copy}/mlflow.db name {copy}/mlartifacts now" in capsys.readouterr().out
        assert sample() == 0 and (copy / "sample.png").read_bytes().startswith(b"\x89PNG")
        assert [address for address in addresses(copy) if "first" in address] == []
        assert main(["relocate"]) == 0
        assert "nothing has moved" in capsys.readouterr().out
    finally:
        hidden.rename(home)


def test_copy_of_a_checkout_is_not_taken_for_the_original(home, copy):
    before = addresses(home)
    assert sample() == 2
    assert main(["relocate"]) == 0
    client = connect(f"sqlite:///{copy / 'mlflow.db'}")
    run = client.create_run(client.get_experiment_by_name("tests").experiment_id)
    assert run.info.artifact_uri.startswith((copy / "mlartifacts").as_uri())
    assert addresses(home) == before


def test_database_without_its_artifacts_is_left_as_it_is(home, copy, capsys):
    before = addresses(copy)
    shutil.rmtree(copy / "mlartifacts")
    assert main(["relocate"]) == 2
    told = capsys.readouterr().err
    assert f"{copy}/mlartifacts lacks the files of 1 models, such as {copy}/mlartifacts/models/m-" in told
    assert f"move or copy the folder {home}/mlartifacts beside {copy}/mlflow.db first" in told
    assert addresses(copy) == before


def test_store_that_is_no_file_has_nothing_to_relocate(tmp_path, monkeypatch, capsys):
    for uri in ("http://127.0.0.1:1", f"sqlite:///{tmp_path / 'mlflow.db'}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["relocate"]) == 2
        assert f"MLFLOW_TRACKING_URI: {uri} is no file of this machine" in capsys.readouterr().err
