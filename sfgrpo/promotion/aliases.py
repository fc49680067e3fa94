"""The aliases `champion` and `previous`, which follow the promotion history."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.config.names import RESERVED_ALIASES
from sfgrpo.errors import RegistryError
from sfgrpo.promotion.history import Promotion, PromotionHistory, append, read_history
from sfgrpo.registry.drawing import smoke_test
from sfgrpo.registry.versions import Version, number_of_alias, read_version

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


def promote_version(
    client: MlflowClient, uri: str, history: PromotionHistory, candidate: Version, run_id: str, scratch: Path
) -> None:
    """Make a version champion, after its files were verified and it has drawn an image.

    Args:
        history: As it was when the promotion was decided.
        run_id: MLflow run of the decision.
        scratch: Folder for the verified copy of the version.

    Raises:
        HistoryError: Another promotion or rollback was decided since; nothing has changed.
        RegistryError: The version is not what was registered, or cannot draw; no alias has moved.
    """
    _require_drawing(client, candidate, scratch)
    entry = Promotion(action="promotion", version=candidate.number, over=history.champion, run_id=run_id)
    append(client, history, entry)
    sync_aliases(client, uri, history.model)


def rollback_champion(client: MlflowClient, uri: str, model: str, scratch: Path) -> tuple[int, int | None]:
    """Make the previous champion champion again, after it has drawn an image; return the old and the new champion.

    Versions that were deleted meanwhile are skipped.

    Raises:
        HistoryError: Another promotion or rollback was decided at the same time; nothing has changed.
        RegistryError: There is no champion or none before it, or the former one is not what was registered or cannot
            draw; no alias has moved.
    """
    history = read_history(client, uri, model)
    if not history.champions:
        raise RegistryError(f"{model} has no champion by promotion, so there is nothing to roll back")
    *former, present = history.champions
    left = [version for number in former if (version := read_version(client, model, number))]
    if not left and read_version(client, model, present):
        raise RegistryError(f"version {present} of {model} is its first champion; there is none before it")
    target = left[-1] if left else None
    if target is not None:
        _require_drawing(client, target, scratch)
    number = None if target is None else target.number
    append(client, history, Promotion(action="rollback", version=number, over=present, run_id=None))
    sync_aliases(client, uri, model)
    return present, number


def _require_drawing(client: MlflowClient, version: Version, scratch: Path) -> None:
    """Draw with a version from a verified copy, and tag it with the outcome."""
    try:
        smoke_test(version, scratch)
    except RegistryError:
        client.set_model_version_tag(version.model, str(version.number), SMOKE_TEST_TAG, "failed")
        raise
    client.set_model_version_tag(version.model, str(version.number), SMOKE_TEST_TAG, "passed")


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
