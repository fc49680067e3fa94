"""The GPUs of the machines as slots that runs take, so that two never share one by accident."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from sfgrpo.config.stages import LaunchStage, load_config
from sfgrpo.errors import ConfigError
from sfgrpo.paths import PARAMS

LIMIT = "gpu"
LEASE_S = 60.0
"""Slots of a run that was killed come free after this time at most."""


@contextlib.contextmanager
def gpu_slots() -> Iterator[None]:
    """Waits for as many slots as the training here has processes, or for all if it has more, and holds them.

    A server that goes away does not stop a training that holds its slots already.

    Raises:
        ConfigError: the server has no such limit, since nobody deployed to it.
    """
    wanted = load_config(LaunchStage, Path(PARAMS)).launch.num_processes
    with concurrency(
        LIMIT, min(wanted, _num_slots()), lease_duration=LEASE_S, raise_on_lease_renewal_failure=False, strict=True
    ):
        yield


def _num_slots() -> int:
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(LIMIT).limit
        except ObjectNotFound as error:
            raise ConfigError(f"the Prefect server has no concurrency limit {LIMIT}; `make deploy` makes it") from error
