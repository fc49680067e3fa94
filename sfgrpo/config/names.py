"""Names that end up in MLflow, checked by its rules without loading it."""

from __future__ import annotations

import posixpath
import re
import unicodedata

MAX_MODEL_NAME = 200
"""MLflow's tables hold 256 characters, which must also take the name of the model's experiment of promotions."""
MAX_ALIAS = 255
FORBIDDEN_IN_MODEL_NAMES = "/:.%\"'@?"
"""MLflow refuses the first six in the name of a logged model; the last two end the name in a `models:/` address."""
RESERVED_ALIASES = ("champion", "previous")
"""Aliases that promotion and rollback alone move."""
VERSION_LIKE = re.compile(r"[vV]\d+")
RUN_ID = re.compile(r"[a-zA-Z0-9][\w-]{0,255}")


def checked_model_name(name: str) -> str:
    """Return the name of a registered model; raise `ValueError` if MLflow or a `models:/` address would refuse it."""
    if found := [character for character in FORBIDDEN_IN_MODEL_NAMES if character in name]:
        raise ValueError(
            f"{name!r} holds {' and '.join(found)}, and the name of a model may hold none of "
            f"{' '.join(FORBIDDEN_IN_MODEL_NAMES)}; write a hyphen instead"
        )
    _check_text(name, "name of a model", MAX_MODEL_NAME)
    if posixpath.normpath(name) != name:
        raise ValueError(f"{name!r} is no name of a file, which the name of a model may become; use another one")
    return name


def checked_alias(alias: str) -> str:
    """Return the alias of a version; raise `ValueError` if MLflow would refuse it."""
    _check_text(alias, "alias", MAX_ALIAS)
    if not re.fullmatch(r"[\w-]+", alias):
        raise ValueError(
            f"{alias!r} is no alias: MLflow takes letters, digits, underscores and hyphens; use one like challenger"
        )
    if alias.lower() == "latest" or VERSION_LIKE.fullmatch(alias):
        raise ValueError(f"{alias!r} is a word that MLflow keeps for versions; use one like challenger")
    return alias


def checked_new_alias(alias: str) -> str:
    """Return an alias that a registration may move; raise `ValueError` for those of promotion as well.

    In any case, width and with any accents, since some databases of MLflow take `Champion` for `champion`.
    """
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", alias) if not unicodedata.combining(letter))
    if plain.strip().casefold() in RESERVED_ALIASES:
        raise ValueError(
            f"{alias!r} is moved by promotion alone, so that every champion has passed the gates; use another alias, "
            "such as challenger, and `python -m sfgrpo promote`"
        )
    return checked_alias(alias)


def checked_run_id(run_id: str) -> str:
    """Return the id of an MLflow run; raise `ValueError` if it cannot be one."""
    if not RUN_ID.fullmatch(run_id):
        raise ValueError(f"{run_id!r} is no id of an MLflow run, which has letters, digits, underscores and hyphens")
    return run_id


def _check_text(text: str, kind: str, longest: int) -> None:
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError(
            f"{text!r} is no {kind}: it is empty, starts or ends with a space, or holds a control character"
        )
    if len(text) > longest:
        raise ValueError(f"{text[:20]!r}... has {len(text)} characters; the {kind} may have {longest}")
