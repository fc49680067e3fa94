"""Which version of a model is champion, and which were before: a ledger that no two promotions can both write.

MLflow's aliases go to the last writer, so two promotions that were both decided against the same champion would both
win. A parameter of an MLflow run is write-once: run and key are the primary key of its table, and MLflow refuses
another value. Every registered model therefore has one run whose parameters `0001`, `0002`, ... are the entries of its
ledger. Whoever decided against a ledger of n entries writes entry n + 1, which one writer alone can. The entry holds a
random claim, so that no two writers ever write the same value.

That run has to be the same one for everybody, too. Names of experiments are unique, and an experiment gets its tags
with its name in one transaction: a model's experiment of promotions names the run of its ledger, and whoever comes too
late with a run of his own removes that.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sfgrpo.errors import SfgrpoError
from sfgrpo.tracking.mlflow_client import find_or_create_experiment, find_run, is_outage

if TYPE_CHECKING:
    from mlflow import MlflowClient


LEDGERS = "promotions"
"""Experiment that holds the ledgers of all models."""
LEDGER_TAG = "sfgrpo.ledger_run_id"
"""Tag of a model's experiment of promotions."""
KIND_TAG = "sfgrpo.kind"
"""Tag of a ledger's run, with the value "ledger": such a run is never cleaned away."""
WRITE_S = 30.0
"""How long an entry is tried to be written while the store is out of reach or busy."""


class HistoryError(SfgrpoError):
    """The ledger has moved on, or is gone."""


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
        return champions_of(self.entries)


def champions_of(entries: Sequence[Promotion]) -> tuple[int, ...]:
    """Replays promotions and rollbacks."""
    champions: list[int] = []
    for entry in entries:
        if entry.action == "promotion" and entry.version is not None:
            if not champions and entry.over is not None:
                # The first entry: somebody had set the alias by hand.
                champions.append(entry.over)
            champions.append(entry.version)
        else:
            champions.pop()
            while champions and champions[-1] != entry.version:
                champions.pop()
    return tuple(champions)


def experiment_of(model: str) -> str:
    """Names the experiment that holds the decisions on a model's versions."""
    return f"promotions of {model}"


def read_ledger(client: MlflowClient, uri: str, model: str) -> PromotionHistory:
    """Reads a model's ledger; makes an empty one if there is none.

    Raises:
        HistoryError: the ledger's run was deleted.
    """
    run_id = _ledger_run(client, uri, model)
    run = find_run(client, run_id)
    if run is None:
        raise HistoryError(
            f"the ledger of {model}, MLflow run {run_id}, was deleted; restore it, in Python by "
            f"MlflowClient().restore_run({run_id!r})"
        )
    params = run.data.params
    return PromotionHistory(
        model=model, run_id=run_id, entries=tuple(_entry(params[slot]) for slot in sorted(params) if slot.isdigit())
    )


def append(client: MlflowClient, ledger: PromotionHistory, entry: Promotion) -> PromotionHistory:
    """Writes the next entry and returns the ledger with it.

    Raises:
        HistoryError: somebody else was faster.
    """
    from mlflow.exceptions import MlflowException

    slot = f"{len(ledger.entries) + 1:04d}"
    value = json.dumps({**dataclasses.asdict(entry), "claim": uuid.uuid4().hex})
    deadline = time.monotonic() + WRITE_S
    while True:
        try:
            client.log_param(ledger.run_id, slot, value, synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise HistoryError(
                    f"another promotion or rollback of {ledger.model} was decided meanwhile; run it again"
                ) from error
            if not is_outage(error) or time.monotonic() > deadline:
                raise
            # It may have been written although the answer was lost: with the same claim another try does no harm.
            time.sleep(0.2)
        else:
            return dataclasses.replace(ledger, entries=(*ledger.entries, entry))


def _ledger_run(client: MlflowClient, uri: str, model: str) -> str:
    known = _named_run(client, model)
    if known is not None:
        return known
    run = client.create_run(find_or_create_experiment(client, uri, LEDGERS), run_name=model, tags={KIND_TAG: "ledger"})
    client.set_terminated(run.info.run_id)
    find_or_create_experiment(client, uri, experiment_of(model), {LEDGER_TAG: run.info.run_id})
    known = _named_run(client, model)
    if known != run.info.run_id:
        client.delete_run(run.info.run_id)
    return str(known)


def _named_run(client: MlflowClient, model: str) -> str | None:
    """Finds the run that a model's experiment of promotions names; None before there is such an experiment."""
    name = experiment_of(model)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    if LEDGER_TAG not in experiment.tags:
        raise HistoryError(f"experiment {name!r} has no tag {LEDGER_TAG}, so it is none of ours; rename it")
    return str(experiment.tags[LEDGER_TAG])


def _entry(value: str) -> Promotion:
    fields = json.loads(value)
    return Promotion(action=fields["action"], version=fields["version"], over=fields["over"], run_id=fields["run_id"])
