"""Peak memory follows allocations and can be reset; failed allocations are told apart from other errors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sfgrpo.runtime import memory
from sfgrpo.runtime.memory import forget_peak, is_exhaustion, peak_megabytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAR_TOO_MUCH = 10**15


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_peak_rises_by_what_was_allocated_and_can_be_forgotten() -> None:
    forget_peak(CPU)
    before = peak_megabytes(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert peak_megabytes(CPU) - before == pytest.approx(64, abs=8)
    forget_peak(CPU)
    assert peak_megabytes(CPU) - before == pytest.approx(0, abs=8)


def test_peak_of_the_whole_process_stands_in_where_there_is_no_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forget_peak(CPU)
    known = peak_megabytes(CPU)
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "absent")
    forget_peak(CPU)
    assert peak_megabytes(CPU) >= known - 1


def test_gpu_has_the_peak_of_torchs_own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**20)
    forget_peak(CUDA)
    assert peak_megabytes(CUDA) == 3 and asked == [CUDA, CUDA]


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_failed_allocation_is_known(allocate) -> None:
    with pytest.raises((RuntimeError, MemoryError), match="allocate") as caught:
        allocate(FAR_TOO_MUCH)
    assert is_exhaustion(caught.value)


def test_failed_allocation_is_known_behind_another_error() -> None:
    error = ValueError("reward failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_exhaustion(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("can't allocate memory")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_exhaustion(error)
