"""The processes of a run: which images belong to which, and how their numbers are gathered, by accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from sfgrpo.errors import SanityCheckError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The images of each process: an equal, consecutive part of the images of each optimiser step.

    Optimiser steps and micro-batches therefore hold the same images for any number of processes; a group may span
    processes.
    """

    num_images: int
    num_steps: int
    """Optimiser steps, each of its own consecutive images."""
    num_processes: int

    def rows(self, process_index: int) -> Tensor:
        """Return the indices of a process's images, ascending: [num_images / num_processes]."""
        return torch.arange(self.num_images).reshape(self.num_steps, self.num_processes, -1)[:, process_index].flatten()

    def in_order(self, rows: Tensor) -> Tensor:
        """Put rows that come process by process, [num_images, ...], into the order of the images."""
        by_process = rows.reshape(self.num_processes, self.num_steps, -1, *rows.shape[1:])
        return by_process.transpose(0, 1).reshape(rows.shape)

    def gather(self, own: Tensor, accelerator: Accelerator) -> Tensor:
        """Gather what each process has for each of its images: [num_images, ...] in the order of the images."""
        return self.in_order(gathered(own, accelerator))


def gathered(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Concatenate the tensors of all processes, equal in shape, along the first dimension, on the CPU."""
    if accelerator.num_processes == 1:
        return value.cpu()
    everyone: Tensor = accelerator.gather(value.contiguous().to(accelerator.device))
    return everyone.cpu()


def summed(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Add up the tensors of all processes, equal in shape, element by element, on the CPU."""
    return gathered(value[None], accelerator).sum(dim=0, dtype=value.dtype)


def total(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Return the sum of each number over all processes, in float64."""
    return _rows_of_all(values, accelerator).sum(dim=0).tolist()


def highest(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Return the maximum of each number over all processes; NaN if any of them is."""
    return _rows_of_all(values, accelerator).amax(dim=0).tolist()


def any_of(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether the flag is set on any process."""
    return bool(total([flag], accelerator)[0])


def total_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes in place; a parameter without one counts as zero."""
    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    # One flat tensor: one transfer instead of one for each of the adapter's hundreds of small matrices.
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    total = accelerator.reduce(nn.utils.parameters_to_vector(gradients), reduction="sum")
    nn.utils.vector_to_parameters(total, gradients)


def agree(text: str, accelerator: Accelerator) -> bool:
    """Return whether all processes have the same text."""
    # 48 bits are exact in float64.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    numbers = _rows_of_all([number], accelerator)
    return bool((numbers == numbers[0]).all())


def require_same_everywhere(parameters: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Raise `SanityCheckError` on all processes unless all have the same parameters, bit for bit."""
    digest = hashlib.sha256()
    for value in parameters.values():
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not agree(digest.hexdigest(), accelerator):
        raise SanityCheckError(
            "the adapters of the processes are no longer the same; use the same hardware and the same package versions "
            "on every node"
        )


def shared_files(files: Mapping[str, bytes] | None, accelerator: Accelerator) -> dict[str, bytes]:
    """Return, on every process, the files of the first process that has any; no files when none has."""
    # As one uint8 tensor, and not by broadcast_object_list: that pickles, and a checkpoint may be large.
    holder = round(-highest([-accelerator.process_index if files else -accelerator.num_processes], accelerator)[0])
    if holder == accelerator.num_processes:
        return {}
    sizes = {name: len(content) for name, content in (files or {}).items()}
    header = _broadcast(json.dumps(sizes).encode(), holder, accelerator)
    content = _broadcast(b"".join((files or {}).values()), holder, accelerator)
    ends = itertools.accumulate(json.loads(header).values(), initial=0)
    return {
        name: content[start:end]
        for name, (start, end) in zip(json.loads(header), itertools.pairwise(ends), strict=True)
    }


def row_slices(num_rows: int, micro_batch_size: int) -> list[slice]:
    """Cut rows 0..num_rows into consecutive slices of at most `micro_batch_size`."""
    return [slice(start, min(start + micro_batch_size, num_rows)) for start in range(0, num_rows, micro_batch_size)]


def even_slices(num_rows: int, micro_batch_size: int, accelerator: Accelerator) -> list[slice]:
    """Cut rows into slices of at most `micro_batch_size`; empty ones at the end make their number equal everywhere.

    A sharded model exchanges its weights in every pass, so a process with fewer rows takes part with empty batches.
    """
    slices = row_slices(num_rows, micro_batch_size)
    most = round(highest([len(slices)], accelerator)[0])
    return slices + [slice(num_rows, num_rows)] * (most - len(slices))


def _broadcast(content: bytes, holder: int, accelerator: Accelerator) -> bytes:
    size = round(total([len(content) if accelerator.process_index == holder else 0], accelerator)[0])
    buffer = torch.zeros(size, dtype=torch.uint8, device=accelerator.device)
    if accelerator.process_index == holder and size:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    received: Tensor = broadcast(buffer, from_process=holder)
    return received.cpu().numpy().tobytes()


def _rows_of_all(values: Sequence[float], accelerator: Accelerator) -> Tensor:
    """Gather the numbers of every process: [num_processes, len(values)] in float64 on the CPU."""
    # The bits travel as integers, since not all accelerators have float64.
    bits = torch.tensor(values, dtype=torch.float64).reshape(1, -1).view(torch.int64)
    return gathered(bits, accelerator).view(torch.float64)
