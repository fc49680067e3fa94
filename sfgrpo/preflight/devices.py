"""Whether the devices that the environment names exist on this machine."""

from __future__ import annotations

import os

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import Environment


def check_device(name: str, variable: str = "SFGRPO_DEVICE") -> str:
    """Return the device of a name such as `cuda:1`, of torch; raise `ConfigError` if this machine has none of it."""
    import torch

    kind, _, number = name.partition(":")
    if kind == "mps":
        available = int(torch.backends.mps.is_available())
    else:
        available = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) < available or kind == "cpu":
        return name
    there = {0: "no such device", 1: "one, number 0"}.get(available, f"{available}, numbers 0 to {available - 1}")
    built = "" if kind != "cuda" or torch.version.cuda else ", and the installed torch is without CUDA"
    raise ConfigError(
        f"environment: {variable}: {name} is not there: torch sees {there}{built}; use another device, cpu or auto, "
        "or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    )


def device_of(environment: Environment) -> str:
    """Return the device of this process: by default each process of a node has a GPU of its own.

    Raises:
        ConfigError: This machine has no such device, or fewer GPUs than processes.
    """
    import torch

    if environment.device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if environment.device not in ("auto", "cuda"):
        return check_device(environment.device)
    return check_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


def check_devices(environment: Environment) -> str:
    """Check the devices of training and evaluation; return what they are."""
    device, evaluation = device_of(environment), environment.evaluation_device
    kind = device.partition(":")[0]
    if evaluation is not None:
        if evaluation.partition(":")[0] != kind:
            raise ConfigError(
                f"environment: SFGRPO_EVALUATION_DEVICE: {evaluation} is no device of the training's kind, {kind}, and "
                f"would give other figures; use {kind} and a number, or unset the variable"
            )
        check_device(evaluation, "SFGRPO_EVALUATION_DEVICE")
    return device if evaluation is None else f"{device}, evaluations on {evaluation}"
