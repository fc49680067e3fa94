"""The processes of a run: which images are whose, and how their numbers come together; transport is accelerate's."""

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
    """Which images of an update are whose: every process has an equal, consecutive part of each optimiser step's.

    Optimiser steps therefore see the same images, and micro-batches are the same, however many processes there are;
    a group may span processes.
    """

    num_images: int
    num_steps: int
    """Optimiser steps, each of which takes its own consecutive images."""
    num_processes: int

    def rows(self, process_index: int) -> Tensor:
        """Gives the images of a process, ascending: [num_images / num_processes]."""
        return torch.arange(self.num_images).reshape(self.num_steps, self.num_processes, -1)[:, process_index].flatten()

    def in_order(self, rows: Tensor) -> Tensor:
        """Put rows that come process by process, [num_images, ...], into the order of the images."""
        by_process = rows.reshape(self.num_processes, self.num_steps, -1, *rows.shape[1:])
        return by_process.transpose(0, 1).reshape(rows.shape)

    def gather(self, own: Tensor, accelerator: Accelerator) -> Tensor:
        """Gather what each process has for each of its images: [num_images, ...] in the order of the images."""
        return self.in_order(gathered(own, accelerator))


def gathered(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Concatenates the tensors of all processes, equal in shape, along the first dimension; it is on the CPU."""
    if accelerator.num_processes == 1:
        return value.cpu()
    everyone: Tensor = accelerator.gather(value.contiguous().to(accelerator.device))
    return everyone.cpu()


def summed(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Adds up the tensors of all processes, equal in shape, number by number; the result is on the CPU."""
    return gathered(value[None], accelerator).sum(dim=0, dtype=value.dtype)


def total(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Adds each number up over all processes, in float64."""
    return _rows_of_all(values, accelerator).sum(dim=0).tolist()


def highest(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Gives the largest of each number over all processes, NaN when any is."""
    return _rows_of_all(values, accelerator).amax(dim=0).tolist()


def any_of(flag: bool, accelerator: Accelerator) -> bool:
    """Tells whether the flag is up on any process."""
    return bool(total([flag], accelerator)[0])


def total_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Adds the gradients up over all processes, in one transfer; a parameter without one counts as zero."""
    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    summed: Tensor = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
    for gradient, part in zip(
        gradients, torch.split(summed, [gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def agree(text: str, accelerator: Accelerator) -> bool:
    """Tells whether all processes hold the same text."""
    # 48 bits are exact in float64.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    numbers = _rows_of_all([number], accelerator)
    return bool((numbers == numbers[0]).all())


def require_same_everywhere(parameters: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Raises `SanityCheckError` on all processes unless all hold the same parameters, bit for bit."""
    digest = hashlib.sha256()
    for value in parameters.values():
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not agree(digest.hexdigest(), accelerator):
        raise SanityCheckError(
            "the adapters of the processes are no longer the same: they have drifted apart; use the same hardware and "
            "the same package versions on every node"
        )


def shared_files(files: Mapping[str, bytes] | None, accelerator: Accelerator) -> dict[str, bytes]:
    """Gives every process the files of the first one that has any; no files when none has."""
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


def even_slices(num_rows: int, micro_batch_size: int, accelerator: Accelerator) -> list[slice]:
    """Cuts rows into consecutive slices, empty ones at the end, so that every process has as many as any other.

    A sharded model exchanges its weights in every pass, so a process with fewer rows has to take part with none.
    """
    starts = list(range(0, num_rows, micro_batch_size))
    most = round(highest([len(starts)], accelerator)[0])
    ends = [min(start + micro_batch_size, num_rows) for start in starts]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)] + [slice(num_rows, num_rows)] * (
        most - len(starts)
    )


def _broadcast(content: bytes, holder: int, accelerator: Accelerator) -> bytes:
    size = round(total([len(content) if accelerator.process_index == holder else 0], accelerator)[0])
    buffer = torch.zeros(size, dtype=torch.uint8, device=accelerator.device)
    if accelerator.process_index == holder and size:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    received: Tensor = broadcast(buffer, from_process=holder)
    return received.cpu().numpy().tobytes()


def _rows_of_all(values: Sequence[float], accelerator: Accelerator) -> Tensor:
    """Gives the numbers of every process: [num_processes, len(values)] in float64 on the CPU."""
    # Not all accelerators know float64; the bits travel as integers.
    bits = torch.tensor(values, dtype=torch.float64).reshape(1, -1).view(torch.int64)
    return gathered(bits, accelerator).view(torch.float64)
