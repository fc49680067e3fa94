"""Peak memory of the process on its device, and failed allocations."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_CPU_MESSAGES = ("can't allocate memory", "std::bad_alloc")
"""Messages of torch on a CPU, for which it has no error class of its own."""


def forget_peak(device: torch.device) -> None:
    """Reset the peak; on a CPU only Linux can, elsewhere the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_megabytes(device: torch.device) -> float:
    """Return the peak in units of 2^20 bytes: of torch's allocations on a GPU, else of the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError), (_PROCESS / "status").open() as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def is_exhaustion(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, means that an allocation failed.

    `should_reduce_batch_size` of accelerate looks at no causes and knows neither `MemoryError` nor `std::bad_alloc`,
    and it takes an unsupported cuDNN call for a lack of memory.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES):
        return True
    return error.__cause__ is not None and is_exhaustion(error.__cause__)
