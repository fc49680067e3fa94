"""Imports without garbage collection."""

from __future__ import annotations

import gc

import pytest

from sfgrpo.runtime.imports import without_collection


def test_garbage_is_collected_again_after_imports_and_after_one_that_fails():
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collection():
        import nothing_of_this_name  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
