"""Promote a registered version to champion, or roll the champion back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfgrpo.config.stages import PromoteStage
from sfgrpo.errors import RegistryError
from sfgrpo.paths import PROMOTION_REPORT
from sfgrpo.preflight.devices import check_devices
from sfgrpo.promotion.aliases import promote_version, rollback_champion, sync_aliases
from sfgrpo.promotion.compare import CANDIDATE, compare_versions, keep_champion
from sfgrpo.promotion.decision import read_decision
from sfgrpo.promotion.evaluation import download_judged
from sfgrpo.promotion.history import HistoryError, PromotionHistory
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import Version, find_version, require_model
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import temporary_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient


def promote(
    config: PromoteStage,
    environment: Environment,
    *,
    model: str | None = None,
    number: int | None = None,
    judge_only: bool = False,
) -> None:
    """Compare a candidate, by default the version with the alias of `registry`, and make it champion if it passes.

    With `judge_only` the decision is written and recorded, and no alias moves.

    Raises:
        HistoryError: Another promotion or rollback was decided meanwhile.
        RegistryError: A version is not what was registered, or the candidate cannot draw; no alias has moved.
    """
    uri = environment.tracking_uri
    check_devices(environment)
    client = connect_globally(uri)
    name = model or config.registry.model_name
    candidate = find_version(
        client, f"models:/{name}@{config.registry.alias}" if number is None else f"models:/{name}/{number}"
    )
    history = sync_aliases(client, uri, name)
    champion_number = history.champion
    if champion_number == candidate.number:
        print(keep_champion(candidate, history).sentence)
        return
    champion = None if champion_number is None else find_version(client, f"models:/{name}/{champion_number}")
    decision = compare_versions(client, config, environment, candidate, champion, history)
    print(f"{decision.sentence}\n\nReport and samples are in {PROMOTION_REPORT} and in MLflow run {decision.run_id}")
    if decision.promoted and judge_only:
        print(f"no alias has moved; `python -m sfgrpo promote --apply {decision.run_id}` makes it champion")
    elif decision.promoted:
        _promote(client, environment, history, candidate, str(decision.run_id))


def apply(environment: Environment, run_id: str) -> None:
    """Make the candidate of an earlier decision champion, unless the champion has changed since.

    Applied twice, it changes nothing.

    Raises:
        HistoryError: The champion has changed.
        RegistryError: There is no such decision, it was not to promote or is not what was decided, or the version is
            not what was registered or cannot draw.
        MismatchError: The decision is of another adapter or base model than the version has.
    """
    uri = environment.tracking_uri
    client = connect_globally(uri)
    decision = read_decision(client, run_id)
    if not decision.promoted:
        raise RegistryError(f"MLflow run {run_id} decided not to promote version {decision.version}")
    history = sync_aliases(client, uri, decision.model)
    if history.entries and (history.entries[-1].action, history.entries[-1].run_id) == ("promotion", run_id):
        print(f"version {decision.version} of {decision.model} is champion already, by this decision")
        return
    if len(history.entries) != decision.num_entries:
        raise HistoryError(
            f"the champion of {decision.model} has changed since MLflow run {run_id} was decided; compare again by "
            f"`python -m sfgrpo promote --model {decision.model} --version {decision.version}`"
        )
    candidate = find_version(client, f"models:/{decision.model}/{decision.version}")
    with temporary_directory(environment.scratch_dir, "promotion") as folder:
        judged = download_judged(candidate, folder)
    judged.require_subject_of(decision.evaluated.get(CANDIDATE, {}), f"the decision of MLflow run {run_id}")
    _promote(client, environment, history, candidate, run_id)


def rollback(environment: Environment, model: str) -> None:
    """Make the previous champion champion again.

    Raises:
        HistoryError: Another promotion or rollback was decided at the same time.
        RegistryError: There is no such model or no champion before, or the former one is not what was registered or
            cannot draw; no alias has moved.
    """
    client = connect_globally(environment.tracking_uri)
    require_model(client, model)
    old, new = rollback_champion(client, environment.tracking_uri, model, environment.scratch_dir)
    now = "it has no champion now" if new is None else f"version {new} is champion again"
    print(f"version {old} of {model} is rolled back; {now}")


def _promote(
    client: MlflowClient, environment: Environment, history: PromotionHistory, candidate: Version, run_id: str
) -> None:
    promote_version(client, environment.tracking_uri, history, candidate, run_id, environment.scratch_dir)
    print(f"version {candidate.number} of {candidate.model} is champion")
