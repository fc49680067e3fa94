"""Names for MLflow: refused where it would refuse them, and taken where it takes them."""

from __future__ import annotations

import re

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlRegisteredModelAlias
from mlflow.store.tracking.dbmodels.models import SqlExperiment
from mlflow.utils import validation

from sfgrpo.cli import main
from sfgrpo.config.names import MAX_ALIAS, MAX_MODEL_NAME, checked_alias, checked_model_name, checked_run_id
from sfgrpo.config.stages import RegistryStage, load_config
from sfgrpo.errors import ConfigError
from sfgrpo.promotion.history import experiment_of
from sfgrpo.registry.versions import find_version
from sfgrpo.tracking.mlflow_client import connect
from tests.support.tiny_run import write_params

# SQLAlchemy's own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MODEL_NAMES = (
    *("sfgrpo-shapes", "a", "m_1", "Modell für Kreise", "圆", "a b", "a#b", "a;b", "a&b", "a\\b", "-", "a" * 200),
    *("", " ", "a/b", "a:b", "a.b", ".", "..", "a%b", 'a"b', "a'b", "/a", "a/../b", "models:/a", "a" * 257),
)
ONLY_OURS = ("a@b", "a?b", "a\nb", "a\x00b", " a", "a ", "a" * 201)
"""Names that MLflow takes, but under which a `models:/` address, or an experiment's name, fails later."""
ALIASES = (
    *("challenger", "a", "A-1_b", "kandidat_ü", "1", "12", "vv1", "v", "v1a", "version1", "a" * 255),
    *("", "latest", "Latest", "LATEST", "v2", "V12", "v0", "a/b", "a b", "a.b", "a'b", "a@b", "a:b", "a" * 256),
)


def mlflow_takes_model_name(name: str) -> bool:
    try:
        validation._validate_model_name(name)
        # The version's files are a logged model of that name.
        validation._validate_logged_model_name(name)
    except MlflowException:
        return False
    return len(name) <= SqlModelVersion.name.type.length


def mlflow_takes_alias(alias: str) -> bool:
    try:
        validation._validate_model_alias_name(alias)
        validation._validate_model_alias_name_reserved(alias)
    except MlflowException:
        return False
    return len(alias) <= SqlRegisteredModelAlias.alias.type.length


def is_taken(check, name: str) -> bool:
    try:
        return check(name) == name
    except ValueError:
        return False


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model_names_are_taken_exactly_where_mlflow_takes_them(name):
    assert is_taken(checked_model_name, name) == mlflow_takes_model_name(name)


@pytest.mark.parametrize("name", ONLY_OURS)
def test_model_names_that_fail_only_later_are_refused_too(name):
    assert not is_taken(checked_model_name, name)


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if is_taken(checked_model_name, name)])
def test_taken_model_names_survive_their_addresses(name):
    assert _parse_model_uri(f"models:/{name}@challenger")[1::3] == (name, "challenger")
    assert _parse_model_uri(f"models:/{name}/3")[1:3] == (name, "3")


def test_longest_model_name_leaves_room_for_its_experiment():
    assert len(experiment_of("a" * MAX_MODEL_NAME)) <= SqlExperiment.name.type.length


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_taken_exactly_where_mlflow_takes_them(alias):
    assert is_taken(checked_alias, alias) == mlflow_takes_alias(alias)


def test_alias_with_a_line_end_is_refused_though_mlflow_overlooks_it():
    assert mlflow_takes_alias("a\n") and not is_taken(checked_alias, "a\n")
    assert MAX_ALIAS == validation.MAX_REGISTERED_MODEL_ALIAS_LENGTH


@pytest.mark.parametrize("run_id", ["a" * 32, "0-_", "a" * 256, "", "-a", "a'b", "a/b", "a b", "a" * 257, "_a"])
def test_run_ids_are_taken_exactly_where_mlflow_takes_them(run_id):
    assert is_taken(checked_run_id, run_id) == bool(validation._RUN_ID_REGEX.match(run_id))


def test_special_names_reach_the_registry_and_come_back(tmp_path):
    store = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in filter(lambda name: is_taken(checked_model_name, name), MODEL_NAMES):
        store.create_registered_model(name)
        assert store.search_model_versions(f"name = '{name}'") == []
        assert store.get_registered_model(name).name == name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"registry.alias": "latest"}, "registry.alias: 'latest' is a word that MLflow keeps for versions"),
        ({"registry.alias": "v2"}, "registry.alias: 'v2' is a word that MLflow keeps for versions"),
        ({"registry.alias": "a/b"}, "registry.alias: 'a/b' is no alias: MLflow takes letters, digits"),
        ({"registry.alias": ""}, "registry.alias: '' is no alias: it is empty"),
        ({"registry.model_name": "a/b"}, "registry.model_name: 'a/b' holds /, and the name of a model may hold none"),
        ({"registry.model_name": "sd3.5"}, "registry.model_name: 'sd3.5' holds .*write a hyphen instead"),
        ({"registry.model_name": "a" * 300}, "registry.model_name: .* has 300 characters; .* may have 200"),
    ],
)
def test_wrong_name_in_the_parameters_is_refused_with_the_cure(tmp_path, changes, complaint):
    write_params(tmp_path, changes)
    with pytest.raises(ConfigError, match=complaint):
        load_config(RegistryStage, tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rollback", "--model", "a/b"], "argument --model: 'a/b' holds /"),
        (["recheck", "--model", "a.b"], "argument --model: 'a.b' holds ."),
        (["promote", "--model", ""], "argument --model: '' is no name of a model"),
        (["promote", "--apply", "../x"], "argument --apply: '../x' is no id of an MLflow run"),
        (["train", "--resume", "../x"], "argument --resume: '../x': String should match pattern '^train-"),
    ],
)
def test_wrong_name_of_an_option_is_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("models:/a.b/1", "models:/a.b/1: 'a.b' holds ."),
        ("models:/a:b@c", "models:/a:b@c: 'a:b' holds :"),
        ("models:/a@latest", "models:/a@latest: 'latest' is a word that MLflow keeps"),
        ("models:/a@b c", "models:/a@b c: 'b c' is no alias"),
        ("models:/a/99999999999", "'models:/a/99999999999' is no model; give"),
        ("models:/a/2147483648", "'models:/a/2147483648' is no model; give"),
        ("models:/a/0", "'models:/a/0' is no model; give"),
        ("models:/a/latest", "'models:/a/latest' is no model; give"),
        ("runs:/a/model", "'runs:/a/model' is no model; give"),
        ("", "'' is no model; give"),
    ],
)
def test_address_that_cannot_exist_is_refused_before_the_store_is_asked(address, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        find_version(None, address)


def test_wrong_id_of_a_run_in_the_environment_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_RUN_ID", "a'b")
    assert main(["show", "--params", str(tmp_path / "params.yaml")]) == 2
    assert 'environment: MLFLOW_RUN_ID: "a\'b": "a\'b" is no id of an MLflow run' in capsys.readouterr().err
