"""The aliases `champion` and `previous`, which follow the ledger, and the proof that what they serve still draws."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sfgrpo.promotion.history import HistoryError, Promotion, PromotionHistory, append, read_ledger
from sfgrpo.registry.register import RegistryError, smoke_test
from sfgrpo.registry.versions import number_of_alias, read_version

if TYPE_CHECKING:
    from mlflow import MlflowClient


CHAMPION = "champion"
PREVIOUS = "previous"
SMOKE_TEST_TAG = "promotion/smoke_test"

logger = logging.getLogger(__name__)


def champion_of(client: MlflowClient, ledger: PromotionHistory) -> int | None:
    """Gives the champion: by the ledger or, before its first entry, by the alias that somebody may have set."""
    if ledger.entries:
        return ledger.champions[-1] if ledger.champions else None
    return number_of_alias(client, ledger.model, CHAMPION)


def sync_aliases(client: MlflowClient, uri: str, model: str) -> PromotionHistory:
    """Points both aliases where the ledger says, and returns it.

    This is how a promotion ends, and what mends one that died in between. Whoever moved an alias looks at the ledger
    once more: so of several at once the last to look sees the last entry, and the aliases end where that says.

    Raises:
        RegistryError: the champion's version was deleted.
    """
    ledger = read_ledger(client, uri, model)
    while ledger.entries:
        newest_first = (*reversed(ledger.champions), None, None)
        _point(client, model, CHAMPION, newest_first[0])
        _point(client, model, PREVIOUS, newest_first[1])
        seen, ledger = ledger, read_ledger(client, uri, model)
        if ledger == seen:
            break
    return ledger


def promote_version(client: MlflowClient, uri: str, ledger: PromotionHistory, version: int, run_id: str) -> None:
    """Makes a version the champion, and has it draw by its alias; takes it back by itself if it cannot.

    Args:
        ledger: as it was when the promotion was decided.
        run_id: MLflow run of the decision.

    Raises:
        HistoryError: another promotion or rollback was decided since; nothing has changed.
        RegistryError: what the alias served could not draw; the former champion is champion again.
    """
    former = champion_of(client, ledger)
    entry = Promotion(action="promotion", version=version, over=former, run_id=run_id)
    verify_champion(client, uri, append(client, ledger, entry))


def verify_champion(client: MlflowClient, uri: str, ledger: PromotionHistory) -> None:
    """Points the aliases at the champion of the last promotion and has it draw; takes the promotion back if it cannot.

    Raises:
        RegistryError: what the alias served could not draw; the former champion is champion again.
    """
    promotion, model = ledger.entries[-1], ledger.model
    sync_aliases(client, uri, model)
    try:
        smoke_test(uri, f"models:/{model}@{CHAMPION}")
    except RegistryError as error:
        client.set_model_version_tag(model, str(promotion.version), SMOKE_TEST_TAG, "failed")
        raise RegistryError(f"{error}; {_taken_back(client, uri, ledger)}") from error
    client.set_model_version_tag(model, str(promotion.version), SMOKE_TEST_TAG, "passed")


def roll_back(client: MlflowClient, uri: str, model: str) -> tuple[int, int | None]:
    """Makes the champion before the present one champion again, and has it draw; returns the old and the new one.

    Versions that were deleted meanwhile are passed over.

    Raises:
        HistoryError: another promotion or rollback was decided at the same time.
        RegistryError: there is no champion, or none before it, or the former one cannot draw.
    """
    ledger = read_ledger(client, uri, model)
    if not ledger.champions:
        raise RegistryError(f"{model} has no champion by promotion, so there is nothing to roll back")
    *former, present = ledger.champions
    left = [number for number in former if read_version(client, model, number)]
    if not left and read_version(client, model, present):
        raise RegistryError(f"version {present} of {model} is its first champion; there is none before it")
    target = left[-1] if left else None
    append(client, ledger, Promotion(action="rollback", version=target, over=present, run_id=None))
    sync_aliases(client, uri, model)
    if target is not None:
        smoke_test(uri, f"models:/{model}@{CHAMPION}")
    return present, target


def _taken_back(client: MlflowClient, uri: str, ledger: PromotionHistory) -> str:
    """Rolls the last promotion back and words the outcome."""
    promotion = ledger.entries[-1]
    entry = Promotion(action="rollback", version=promotion.over, over=promotion.version, run_id=promotion.run_id)
    try:
        append(client, ledger, entry)
    except HistoryError:
        return "another promotion or rollback was decided meanwhile, and stands"
    sync_aliases(client, uri, ledger.model)
    return "there is no champion again" if promotion.over is None else f"version {promotion.over} is champion again"


def _point(client: MlflowClient, model: str, alias: str, number: int | None) -> None:
    present = number_of_alias(client, model, alias)
    if present == number:
        return
    if number is not None and read_version(client, model, number) is None:
        if alias == CHAMPION:
            raise RegistryError(
                f"version {number} is champion of {model} and was deleted from the registry; "
                "`python -m sfgrpo rollback` makes the one before it champion"
            )
        number = None
    if number is not None:
        client.set_registered_model_alias(model, alias, str(number))
    elif present is not None:
        client.delete_registered_model_alias(model, alias)
    logger.info("%s@%s: %s, was %s", model, alias, _worded(number), _worded(present))


def _worded(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"
