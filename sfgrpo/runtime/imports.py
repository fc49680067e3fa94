"""Quicker imports of large libraries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keep garbage from being looked for during imports.

    Torch, diffusers and MLflow make a million objects that all stay; to look through them again and again as they are
    made is a seventh of the time that it takes to import them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
