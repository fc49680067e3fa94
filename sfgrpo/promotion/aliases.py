"""The aliases `champion` and `previous`, which follow the promotion history."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sfgrpo.config.names import RESERVED_ALIASES
from sfgrpo.promotion.history import HistoryError, Promotion, PromotionHistory, append, read_history
from sfgrpo.registry.register import RegistryError, smoke_test
from sfgrpo.registry.versions import number_of_alias, read_version

if TYPE_CHECKING:
    from mlflow import MlflowClient


CHAMPION, PREVIOUS = RESERVED_ALIASES
SMOKE_TEST_TAG = "promotion/smoke_test"

logger = logging.getLogger(__name__)


def sync_aliases(client: MlflowClient, uri: str, model: str) -> PromotionHistory:
    """Point both aliases where the history says, and return the history.

    A promotion ends with this, and the next call repairs a promotion that died before it. An alias that somebody has
    set past the gates is moved back or, where no version was ever promoted, removed.

    Raises:
        RegistryError: The champion's version was deleted.
    """
    history = read_history(client, uri, model)
    while True:
        newest_first = (*reversed(history.champions), None, None)
        _set_alias(client, model, CHAMPION, newest_first[0])
        _set_alias(client, model, PREVIOUS, newest_first[1])
        # Read again after every move: of several processes the last to read sees the last entry, so the aliases end
        # where that says.
        seen, history = history, read_history(client, uri, model)
        if history == seen:
            return history


def promote_version(client: MlflowClient, uri: str, history: PromotionHistory, version: int, run_id: str) -> None:
    """Make a version the champion and draw with it by its alias; undo the promotion if it cannot draw.

    Args:
        history: As it was when the promotion was decided.
        run_id: MLflow run of the decision.

    Raises:
        HistoryError: Another promotion or rollback was decided since; nothing has changed.
        RegistryError: The new champion cannot draw; the former champion is champion again.
    """
    entry = Promotion(action="promotion", version=version, over=history.champion, run_id=run_id)
    verify_champion(client, uri, append(client, history, entry))


def verify_champion(client: MlflowClient, uri: str, history: PromotionHistory) -> None:
    """Point the aliases at the champion of the last promotion and draw with it; undo the promotion if it cannot draw.

    Raises:
        RegistryError: The champion cannot draw; the former champion is champion again.
    """
    promotion, model = history.entries[-1], history.model
    sync_aliases(client, uri, model)
    try:
        smoke_test(uri, f"models:/{model}@{CHAMPION}")
    except RegistryError as error:
        client.set_model_version_tag(model, str(promotion.version), SMOKE_TEST_TAG, "failed")
        raise RegistryError(f"{error}; {_undo(client, uri, history)}") from error
    client.set_model_version_tag(model, str(promotion.version), SMOKE_TEST_TAG, "passed")


def rollback_champion(client: MlflowClient, uri: str, model: str) -> tuple[int, int | None]:
    """Make the previous champion champion again and draw with it; return the old and the new champion.

    Versions that were deleted meanwhile are skipped.

    Raises:
        HistoryError: Another promotion or rollback was decided at the same time.
        RegistryError: There is no champion or none before it, or the former one cannot draw.
    """
    history = read_history(client, uri, model)
    if not history.champions:
        raise RegistryError(f"{model} has no champion by promotion, so there is nothing to roll back")
    *former, present = history.champions
    left = [number for number in former if read_version(client, model, number)]
    if not left and read_version(client, model, present):
        raise RegistryError(f"version {present} of {model} is its first champion; there is none before it")
    target = left[-1] if left else None
    append(client, history, Promotion(action="rollback", version=target, over=present, run_id=None))
    sync_aliases(client, uri, model)
    if target is not None:
        smoke_test(uri, f"models:/{model}@{CHAMPION}")
    return present, target


def _undo(client: MlflowClient, uri: str, history: PromotionHistory) -> str:
    """Roll the last promotion back and return the outcome as text."""
    promotion = history.entries[-1]
    entry = Promotion(action="rollback", version=promotion.over, over=promotion.version, run_id=promotion.run_id)
    try:
        append(client, history, entry)
    except HistoryError:
        return "another promotion or rollback was decided meanwhile and remains in force"
    sync_aliases(client, uri, history.model)
    return "there is no champion again" if promotion.over is None else f"version {promotion.over} is champion again"


def _set_alias(client: MlflowClient, model: str, alias: str, number: int | None) -> None:
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
    logger.info("alias %s of %s moved from version %s to %s", alias, model, present, number)
