"""The promotion history: which version of a model is champion, and which versions were before.

MLflow's aliases go to the last writer, so two promotions that were both decided against the same champion would both
win. The history lets one of them win: it is a list of entries in the MLflow store, and of all that were decided against
a history of n entries, one alone can write entry n + 1.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import TYPE_CHECKING, Literal

from sfgrpo.errors import SfgrpoError
from sfgrpo.tracking.mlflow_client import find_or_create_experiment, find_run, is_outage

if TYPE_CHECKING:
    from mlflow import MlflowClient


HISTORIES = "promotions"
"""Experiment that holds the histories of all models, a run for each."""
# The stored tags keep the old word for a history, so that the histories of existing stores are found.
HISTORY_TAG = "sfgrpo.ledger_run_id"
"""Tag of a model's experiment of promotions: the run of its history."""
KIND_TAGS = {"sfgrpo.kind": "ledger"}
"""Tags of a history's run, by which a person sees that it must not be cleaned away."""
WRITE_S = 30.0
"""How long to retry an entry while the store is unreachable or busy."""


class HistoryError(SfgrpoError):
    """The promotion history has moved on, or is gone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """One change of the champion."""

    action: Literal["promotion", "rollback"]
    version: int | None
    """Champion from here on; None after the first one was rolled back."""
    over: int | None
    """Champion until here."""
    run_id: str | None
    """MLflow run of the decision; None where a person rolled back."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromotionHistory:
    """All changes of a model's champion, as they stood when they were read."""

    model: str
    run_id: str
    """MLflow run whose parameters are the entries."""
    entries: tuple[Promotion, ...]

    @property
    def champions(self) -> tuple[int, ...]:
        """Versions that were promoted and not rolled back, the champion last."""
        champions: list[int] = []
        for entry in self.entries:
            if entry.action == "promotion" and entry.version is not None:
                if not champions and entry.over is not None:
                    # The first entry of an older store, which took an alias that was set by hand for a champion.
                    champions.append(entry.over)
                champions.append(entry.version)
            else:
                champions.pop()
                while champions and champions[-1] != entry.version:
                    champions.pop()
        return tuple(champions)

    @property
    def champion(self) -> int | None:
        """The champion; None where no version was promoted, whatever aliases the model has."""
        return self.champions[-1] if self.champions else None


def experiment_of(model: str) -> str:
    """Return the name of the experiment that holds the decisions on a model's versions."""
    return f"promotions of {model}"


def read_history(client: MlflowClient, uri: str, model: str) -> PromotionHistory:
    """Read a model's promotion history, or create it; raise `HistoryError` if its run was deleted."""
    run_id = _history_run(client, uri, model)
    run = find_run(client, run_id)
    if run is None:
        raise HistoryError(
            f"the promotion history of {model}, MLflow run {run_id}, was deleted; restore it, in Python by "
            f"MlflowClient().restore_run({run_id!r})"
        )
    slots = sorted((key, json.loads(value)) for key, value in run.data.params.items() if key.isdigit())
    names = [field.name for field in dataclasses.fields(Promotion)]
    entries = tuple(Promotion(**{name: fields[name] for name in names}) for _, fields in slots)
    return PromotionHistory(model=model, run_id=run_id, entries=entries)


def append(client: MlflowClient, history: PromotionHistory, entry: Promotion) -> PromotionHistory:
    """Write the next entry and return the history with it; raise `HistoryError` if somebody else was faster."""
    from mlflow.exceptions import MlflowException

    # Parameters of a run are write-once: run and key are the primary key of their table, and MLflow refuses another
    # value for a key. So `0001`, `0002`, ... each have one writer. MLflow accepts the same value twice; the random
    # claim tells apart two writers with the same entry.
    slot = f"{len(history.entries) + 1:04d}"
    value = json.dumps({**dataclasses.asdict(entry), "claim": uuid.uuid4().hex})
    deadline = time.monotonic() + WRITE_S
    while True:
        try:
            client.log_param(history.run_id, slot, value, synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise HistoryError(
                    f"another promotion or rollback of {history.model} was decided meanwhile; run it again"
                ) from error
            if not is_outage(error) or time.monotonic() > deadline:
                raise
            # It may have been written although the answer was lost: with the same claim another try does no harm.
            time.sleep(0.2)
        else:
            return dataclasses.replace(history, entries=(*history.entries, entry))


def _history_run(client: MlflowClient, uri: str, model: str) -> str:
    """Return the run of a model's history, the same one for all processes; create it if there is none."""
    known = _tagged_run(client, model)
    if known is not None:
        return known
    run = client.create_run(find_or_create_experiment(client, uri, HISTORIES), run_name=model, tags=KIND_TAGS)
    client.set_terminated(run.info.run_id)
    # Names of experiments are unique, and an experiment gets its tags with its name in one transaction: of several
    # processes that come here at once, one has its run in the tag, and the others remove theirs.
    find_or_create_experiment(client, uri, experiment_of(model), {HISTORY_TAG: run.info.run_id})
    known = _tagged_run(client, model)
    if known != run.info.run_id:
        client.delete_run(run.info.run_id)
    return str(known)


def _tagged_run(client: MlflowClient, model: str) -> str | None:
    """Return the run that a model's experiment of promotions has in its tag; None before there is an experiment."""
    name = experiment_of(model)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    if HISTORY_TAG not in experiment.tags:
        raise HistoryError(f"experiment {name!r} has no tag {HISTORY_TAG}, so it holds no promotions; rename it")
    return str(experiment.tags[HISTORY_TAG])
