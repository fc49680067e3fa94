"""Memory, disks and locks of this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sfgrpo.errors import ConfigError
from sfgrpo.preflight.devices import check_devices
from sfgrpo.preflight.report import Doubt
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.locks import lock_existing

GIGABYTE = 10**9
ENOUGH_DISK = 2 * GIGABYTE
"""What the demo and its data take, with room to spare."""


def describe_device(environment: Environment) -> str:
    """Check the devices; return them with their memory, and the threads of a CPU."""
    import torch

    text = check_devices(environment)
    kind = text.partition(":")[0]
    if kind == "cuda":
        index = int(text.partition(",")[0].partition(":")[2] or 0)
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        return f"{text}: {name}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = environment.num_threads or torch.get_num_threads()
    if threads > cores:
        raise Doubt(f"{text}: {threads} threads on {cores} cores wait for one another; lower SFGRPO_NUM_THREADS")
    return f"{text}: {threads} threads on {cores} cores"


def check_memory(model: Path) -> str:
    """Compare the memory that is free with the size of the base model's weights."""
    free, weights = _free_memory(), sum(path.stat().st_size for path in model.glob("*/*.safetensors"))
    if free is None:
        return "unknown on this system"
    text = f"{free / GIGABYTE:.1f} GB free, weights of {weights / GIGABYTE:.2f} GB"
    if free < 2 * weights:
        raise Doubt(f"{text}, which are loaded before they are used; end other programs, or use a larger machine")
    return text


def check_folder(folder: Path) -> str:
    """Check that files can be written into a folder, or into the one in which it will be made, and how many.

    Raises:
        ConfigError: Nothing can be written there.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); correct its rights, or name another folder"
        ) from error
    if free < ENOUGH_DISK:
        raise Doubt(f"{folder}: {free / GIGABYTE:.1f} GB free; make room, since checkpoints and images need some")
    return f"{folder}: {free / GIGABYTE:.1f} GB free"


def check_locks(folder: Path) -> str:
    """Check that the file system of a folder has locks, by which a run is trained by one process at a time.

    Raises:
        ConfigError: There are no locks, or they lock nobody out.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    with (
        tempfile.NamedTemporaryFile(dir=there) as file,
        lock_existing(Path(file.name)) as first,
        lock_existing(Path(file.name)) as second,
    ):
        if first and second is False:
            return f"work in {there}"
    raise ConfigError(
        f"the file system of {there} has no file locks, so two processes could train one run and damage mlflow.db; set "
        "SFGRPO_SCRATCH and MLFLOW_TRACKING_URI to a local disk"
    )


def _free_memory() -> int | None:
    """Return the bytes that programs can still take; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return sizes.get("MemAvailable", 0) * 1024
