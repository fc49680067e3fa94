"""One local stack for all tests that ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stack import Stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A stack in which everything is healthy; whoever breaks it mends it."""
    with Stack() as running:
        yield running
