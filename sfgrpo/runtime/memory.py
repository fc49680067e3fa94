"""How much memory the process needed, on the device that it computes on, and whether that was too much."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_CPU_MESSAGES = ("can't allocate memory", "std::bad_alloc")
"""What torch says on a CPU, where it has no error of its own for it."""


def forget_peak(device: torch.device) -> None:
    """Starts a new high-water mark.

    On a CPU this takes Linux. Where it cannot be done, the mark stays that of the whole process, and never falls.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_megabytes(device: torch.device) -> float:
    """Gives the high-water mark in units of 2^20 bytes: what torch had allocated on a GPU, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError), (_PROCESS / "status").open() as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def is_exhaustion(error: BaseException) -> bool:
    """Tells whether an error, or one that it was raised from, says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES):
        return True
    return error.__cause__ is not None and is_exhaustion(error.__cause__)
