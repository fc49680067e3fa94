"""The promotion history: one writer of an entry, one history of a model, aliases that follow; by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sfgrpo.errors import RegistryError
from sfgrpo.promotion import aliases as module
from sfgrpo.promotion.aliases import CHAMPION, PREVIOUS, sync_aliases
from sfgrpo.promotion.history import (
    HISTORY_TAG,
    HistoryError,
    Promotion,
    PromotionHistory,
    append,
    experiment_of,
    read_history,
)
from sfgrpo.registry.versions import number_of_alias
from sfgrpo.tracking.mlflow_client import connect
from tests.support.paths import ROOT
from tests.support.stores import copy_database, make_versions, mlflow_server

# From libraries, not from us: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NUM_WRITERS = 8
WRITER = """
import logging, sys
from sfgrpo.promotion.aliases import sync_aliases
from sfgrpo.promotion.history import Promotion, HistoryError, append, read_history
from sfgrpo.tracking.mlflow_client import connect
uri, version = sys.argv[1], int(sys.argv[2])
client = connect(uri)
print("ready", flush=True)
for line in sys.stdin:
    history = read_history(client, uri, "model")
    print(history.run_id, len(history.entries), flush=True)
    sys.stdin.readline()
    try:
        append(client, history, Promotion(action="promotion", version=version, over=None, run_id=None))
        sync_aliases(client, uri, "model")
    except HistoryError as error:
        print("lost", error, flush=True)
    else:
        print("won", flush=True)
"""
"""Reads the history and, when all others have read it too, writes the next entry; again and again."""


def promotion(version: int, over: int | None = None) -> Promotion:
    return Promotion(action="promotion", version=version, over=over, run_id="r")


def rolled_back_to(version: int | None, over: int) -> Promotion:
    return Promotion(action="rollback", version=version, over=over, run_id=None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make_versions(connect(f"sqlite:///{folder / 'mlflow.db'}"), "model", 4)
    return folder / "mlflow.db"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> tuple[MlflowClient, str]:
    copy_database(template, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return connect(uri), uri


def aliases(client: MlflowClient) -> tuple[int | None, int | None]:
    return number_of_alias(client, "model", CHAMPION), number_of_alias(client, "model", PREVIOUS)


@pytest.mark.parametrize(
    ("entries", "champions"),
    [
        ([], ()),
        ([promotion(1)], (1,)),
        ([promotion(2, over=1)], (1, 2)),
        ([promotion(1), promotion(2, over=1), promotion(3, over=2)], (1, 2, 3)),
        ([promotion(1), promotion(2, over=1), rolled_back_to(1, 2)], (1,)),
        ([promotion(1), promotion(2), promotion(3), rolled_back_to(1, 3)], (1,)),
        ([promotion(1), promotion(2), promotion(1), rolled_back_to(2, 1)], (1, 2)),
        ([promotion(1), rolled_back_to(None, 1)], ()),
        ([promotion(1), rolled_back_to(None, 1), promotion(2)], (2,)),
    ],
)
def test_champions_are_those_promoted_and_not_rolled_back(entries, champions):
    assert PromotionHistory(model="model", run_id="r", entries=tuple(entries)).champions == champions


def test_entries_are_read_as_they_were_written(store):
    client, uri = store
    entries = (promotion(1), promotion(2, over=1), rolled_back_to(1, 2))
    for entry in entries:
        append(client, read_history(client, uri, "model"), entry)
    assert read_history(client, uri, "model").entries == entries


def test_entry_written_against_an_outdated_history_is_refused(store):
    client, uri = store
    outdated = read_history(client, uri, "model")
    append(client, outdated, promotion(1))
    with pytest.raises(
        HistoryError, match="another promotion or rollback of model was decided meanwhile; run it again"
    ):
        append(client, outdated, promotion(1))
    assert read_history(client, uri, "model").entries == (promotion(1),)


def test_models_have_histories_of_their_own(store):
    client, uri = store
    append(client, read_history(client, uri, "model"), promotion(1))
    assert read_history(client, uri, "other").entries == ()


def test_params_that_are_no_entries_are_skipped(store):
    client, uri = store
    history = append(client, read_history(client, uri, "model"), promotion(1))
    client.log_param(history.run_id, "note", "by hand")
    assert read_history(client, uri, "model") == history


def test_deleted_history_is_reported_with_its_cure(store):
    client, uri = store
    history = append(client, read_history(client, uri, "model"), promotion(1))
    client.delete_run(history.run_id)
    with pytest.raises(
        HistoryError, match=rf"MLflow run {history.run_id}, was deleted; .*restore_run\('{history.run_id}'"
    ):
        read_history(client, uri, "model")
    client.restore_run(history.run_id)
    assert read_history(client, uri, "model") == history


def test_foreign_experiment_of_the_same_name_is_reported(store):
    client, uri = store
    client.create_experiment(experiment_of("model"))
    with pytest.raises(
        HistoryError, match=f"'promotions of model' has no tag {HISTORY_TAG}, so it holds no promotions"
    ):
        read_history(client, uri, "model")


def test_aliases_follow_the_history(store):
    client, uri = store
    seen = []
    for entry in (promotion(1), promotion(2, over=1), rolled_back_to(1, 2), rolled_back_to(None, 1)):
        append(client, read_history(client, uri, "model"), entry)
        sync_aliases(client, uri, "model")
        seen.append(aliases(client))
    assert seen == [(1, None), (2, 1), (1, None), (None, None)]


def test_promotion_that_died_before_it_moved_the_aliases_is_repaired(store):
    client, uri = store
    append(client, read_history(client, uri, "model"), promotion(1))
    sync_aliases(client, uri, "model")
    append(client, read_history(client, uri, "model"), promotion(2, over=1))
    assert aliases(client) == (1, None)
    sync_aliases(client, uri, "model")
    assert aliases(client) == (2, 1)


def test_alias_that_was_moved_by_hand_is_moved_back(store):
    client, uri = store
    append(client, read_history(client, uri, "model"), promotion(1))
    client.set_registered_model_alias("model", CHAMPION, "3")
    sync_aliases(client, uri, "model")
    assert aliases(client) == (1, None)


@pytest.mark.parametrize("alias", [CHAMPION, PREVIOUS])
def test_alias_that_was_set_by_hand_before_the_first_promotion_is_removed(store, alias):
    client, uri = store
    client.set_registered_model_alias("model", alias, "3")
    history = sync_aliases(client, uri, "model")
    assert history.champion is None
    assert aliases(client) == (None, None)


def test_first_entry_of_an_older_store_names_the_champion_that_was_set_by_hand(store):
    client, uri = store
    append(client, read_history(client, uri, "model"), promotion(4, over=3))
    sync_aliases(client, uri, "model")
    assert aliases(client) == (4, 3)


def test_late_promoter_does_not_leave_its_own_alias(store, monkeypatch):
    client, uri = store
    append(client, read_history(client, uri, "model"), promotion(1))
    set_alias = module._set_alias

    def overtaken(*arguments):
        if not overtaken.done:
            overtaken.done = True
            append(client, read_history(client, uri, "model"), promotion(2, over=1))
            client.set_registered_model_alias("model", CHAMPION, "2")
        set_alias(*arguments)

    overtaken.done = False
    monkeypatch.setattr(module, "_set_alias", overtaken)
    sync_aliases(client, uri, "model")
    assert aliases(client) == (2, 1)


def test_deleted_champion_is_reported_and_deleted_predecessor_is_skipped(store):
    client, uri = store
    for entry in (promotion(1), promotion(2, over=1), promotion(3, over=2)):
        append(client, read_history(client, uri, "model"), entry)
    client.delete_model_version("model", "2")
    sync_aliases(client, uri, "model")
    assert aliases(client) == (3, None)
    client.delete_model_version("model", "3")
    with pytest.raises(RegistryError, match="version 3 is champion of model and was deleted"):
        sync_aliases(client, uri, "model")


class Writers:
    """Processes that write to one history at the same time."""

    def __init__(self, uri: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", WRITER, uri, str(version)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for version in range(1, NUM_WRITERS + 1)
        ]
        self.lines()

    def lines(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self._processes]

    def go(self) -> list[str]:
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return self.lines()

    def close(self) -> None:
        for process in self._processes:
            process.communicate(timeout=60)


def compete(uri: str, rounds: int) -> None:
    """Let many write each entry: one wins, everybody has the same history, and the alias is the last winner's."""
    client = connect(uri)
    make_versions(client, "model", NUM_WRITERS)
    writers = Writers(uri)
    for number in range(rounds):
        assert len(set(writers.go())) == 1, "all read the same history"
        outcomes = writers.go()
        assert Counter(line.split()[0] for line in outcomes) == {"won": 1, "lost": NUM_WRITERS - 1}, outcomes
        history = read_history(client, uri, "model")
        assert len(history.entries) == number + 1
        assert [f"version {entry.version}" for entry in history.entries[-1:]] == [
            f"version {outcomes.index('won') + 1}"
        ]
        assert aliases(client)[0] == history.entries[-1].version
    writers.close()


@pytest.mark.slow
def test_one_of_many_writers_wins_in_a_database(tmp_path):
    compete(f"sqlite:///{tmp_path / 'mlflow.db'}", rounds=5)


@pytest.mark.slow
def test_one_of_many_writers_wins_at_a_server(tmp_path):
    with mlflow_server(tmp_path) as uri:
        compete(uri, rounds=3)
