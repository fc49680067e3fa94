"""The GPUs of the machines as slots of a Prefect concurrency limit, so that two runs never share one by accident."""

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
from tasks.worktree import is_deployed

LIMIT = "gpu"
LEASE_S = 60.0
"""The longest time after which the slots of a killed run come free."""


@contextlib.contextmanager
def gpu_slots() -> Iterator[None]:
    """Hold one slot for each process of the training, or all slots if it has more; wait for them first.

    Only runs of deployments take slots: whoever works in place chooses the GPUs. A server that goes away does not stop
    a training that holds its slots already.

    Raises:
        ConfigError: the server has no such limit, since nobody deployed to it.
    """
    if not is_deployed():
        yield
        return
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
