"""What people and flows do with registered versions: promote, roll back, recheck, sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfgrpo.config.stages import PromoteStage
from sfgrpo.paths import PROMOTION_REPORT
from sfgrpo.promotion.aliases import champion_of, promote_version, roll_back, sync_aliases, verify_champion
from sfgrpo.promotion.compare import champion_already, judge
from sfgrpo.promotion.decision import PromotionDecision, read_judgement
from sfgrpo.promotion.history import HistoryError, PromotionHistory
from sfgrpo.registry.register import RegistryError, connect_globally
from sfgrpo.registry.versions import _require_model, download_version, find_version
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
    """Judges a candidate, by default the version with the alias of `registry`, and makes it champion if it passes.

    With `judge_only` the decision is written and recorded, and nothing moves.

    Raises:
        HistoryError: another promotion or rollback was decided while this one was judged.
        RegistryError: a version is not what was registered, or the new champion cannot draw.
    """
    client, uri = connect_globally(environment.tracking_uri), environment.tracking_uri
    name = model or config.registry.model_name
    candidate = find_version(
        client, f"models:/{name}@{config.registry.alias}" if number is None else f"models:/{name}/{number}"
    )
    ledger = sync_aliases(client, uri, name)
    champion = champion_of(client, ledger)
    if champion == candidate.number:
        print(champion_already(candidate, ledger).sentence)
        return
    opponent = None if champion is None else find_version(client, f"models:/{name}/{champion}")
    judgement = judge(client, config, environment, candidate, opponent, ledger)
    print(f"{judgement.sentence}\n\nFigures and samples are in {PROMOTION_REPORT}, MLflow run {judgement.run_id}")
    if judgement.promoted and judge_only:
        print(f"nothing has moved; `python -m sfgrpo promote --apply {judgement.run_id}` makes it champion")
    elif judgement.promoted:
        _crown(client, uri, ledger, judgement)


def apply(environment: Environment, run_id: str) -> None:
    """Makes the candidate of an earlier decision champion, unless the champion has changed since.

    Applied twice, it changes nothing and has the champion draw once more.

    Raises:
        HistoryError: the champion has changed.
        RegistryError: there is no such decision, it was not to promote, or the version is not what was registered.
    """
    client, uri = connect_globally(environment.tracking_uri), environment.tracking_uri
    judgement = read_judgement(client, run_id)
    if not judgement.promoted:
        raise RegistryError(f"MLflow run {run_id} decided not to promote version {judgement.version}")
    ledger = sync_aliases(client, uri, judgement.model)
    if _is_applied(ledger, judgement):
        # Whoever applied it may have died before the proof.
        verify_champion(client, uri, ledger)
        print(f"version {judgement.version} of {judgement.model} is champion already, by this decision")
        return
    if len(ledger.entries) != judgement.num_entries:
        raise HistoryError(
            f"MLflow run {run_id} decided against a champion of {judgement.model} that has changed since; judge again "
            f"by `python -m sfgrpo promote --model {judgement.model} --version {judgement.version}`"
        )
    candidate = find_version(client, f"models:/{judgement.model}/{judgement.version}")
    with temporary_directory(environment.scratch_dir, "promotion") as folder:
        download_version(candidate, folder)
    _crown(client, uri, ledger, judgement)


def rollback(environment: Environment, model: str) -> None:
    """Makes the champion before the present one champion again.

    Raises:
        HistoryError: another promotion or rollback was decided at the same time.
        RegistryError: there is no such model or no champion before, or the former one cannot draw.
    """
    client = connect_globally(environment.tracking_uri)
    _require_model(client, model)
    old, new = roll_back(client, environment.tracking_uri, model)
    now = "it has no champion now" if new is None else f"version {new} is champion again"
    print(f"version {old} of {model} is rolled back; {now}")


def _crown(client: MlflowClient, uri: str, ledger: PromotionHistory, judgement: PromotionDecision) -> None:
    promote_version(client, uri, ledger, judgement.version, str(judgement.run_id))
    print(f"version {judgement.version} of {judgement.model} is champion")


def _is_applied(ledger: PromotionHistory, judgement: PromotionDecision) -> bool:
    """Tells whether the last change of the champion was by this decision."""
    last = ledger.entries[-1] if ledger.entries else None
    return last is not None and last.action == "promotion" and last.run_id == judgement.run_id
