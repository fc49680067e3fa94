"""Launch of a training as several ranks, on one node or more, with torch's elastic agent.

Each node has a launcher, which starts the ranks, restarts all of them when one fails, and forwards requests to stop.
Nodes find each other as under torchrun, by PET_RDZV_ENDPOINT and PET_RDZV_ID; torchrun may start the ranks as well.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import uuid
from collections.abc import Mapping, Sequence

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.run import config_from_args, get_args_parser

from sfgrpo.config.schema import LaunchConfig
from sfgrpo.errors import ConfigError, ExitStatus, Preempted, SfgrpoError
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import temporary_directory
from sfgrpo.runtime.rank import LAUNCHER
from sfgrpo.runtime.shutdown import KILL_MARGIN_S, RANKS_STOPPED, GracefulShutdown

logger = logging.getLogger(__name__)

SOON_S = 5
"""Failures this close together are treated as one."""


def launch_ranks(
    launch: LaunchConfig, environment: Environment, arguments: Sequence[str], shutdown: GracefulShutdown
) -> None:
    """Run this Python with `arguments` as every rank of this node, and return when all are done.

    `shutdown` must not be deferred: its exception makes the agent stop the ranks and wait for them.

    Raises:
        Preempted: This process or a rank was told to stop, or the other nodes are out of reach.
        ConfigError: The launch does not fit the machine, or a rank refused its configuration.
        SfgrpoError: Ranks failed more often than `launch.max_restarts`, or the run has ended on another node.
    """
    _check_devices(launch, environment)
    rendezvous = _rendezvous_options(launch, os.environ)
    _silence_torch()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // launch.num_processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    # Torch would keep one store over all restarts: ranks find addresses of dead ones there, and a node that returns
    # never learns the store's address, https://github.com/pytorch/pytorch/issues/135712.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with temporary_directory(environment.scratch_dir, "ranks") as folder:
        options = {
            **rendezvous,
            "nnodes": launch.num_nodes,
            "nproc-per-node": launch.num_processes,
            "max-restarts": launch.max_restarts,
            # `shutdown` handles the other signals.
            "signals-to-handle": "SIGQUIT",
            "shutdown-timeout": math.ceil(environment.grace_s) + KILL_MARGIN_S,
        }
        if "PET_LOG_DIR" not in os.environ:
            options["log-dir"] = folder.resolve()
        flags = [f"--{name}={value}" for name, value in options.items()]
        config, command, rest = config_from_args(get_args_parser().parse_args([*flags, *arguments]))
        try:
            _run(config, str(command), rest, shutdown)
        except SignalException as error:
            raise Preempted("the ranks were killed; starting the run again resumes it") from error
        except RendezvousClosedError as error:
            raise SfgrpoError("the run has ended on another node; see the output there") from error
        except (RendezvousError, DistError) as error:
            cause = f"{type(error).__name__} {error}".strip()
            raise Preempted(f"the other nodes are out of reach ({cause}); starting the run again resumes it") from error


def _run(config: ElasticConfig, command: str, arguments: Sequence[str], shutdown: GracefulShutdown) -> None:
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    rendezvous = get_rendezvous_handler(
        RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=rendezvous,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
    )
    result = _Agent(spec, config, shutdown).run()
    # This tells the other nodes that the run is over. A preempted node leaves the rendezvous open, for its return.
    rendezvous.shutdown()
    if result.is_failed():
        rank, failure = _first_failure(result.failures)
        raise SfgrpoError(
            f"{_describe(rank, failure)}; all ranks were restarted {config.max_restarts} times "
            "(launch.max_restarts); see their output above"
        )


class _Agent(LocalElasticAgent):
    """Torch's agent, which monitors the ranks of a node, with exit statuses that mean more than failure.

    Torch has no public hook for that: `_monitor_workers` and `_remaining_restarts` are private, so a new version of
    torch may need changes here. `tests/runtime/test_launcher.py` would fail.
    """

    def __init__(self, spec: WorkerSpec, config: ElasticConfig, shutdown: GracefulShutdown) -> None:
        assert config.logs_specs is not None and config.shutdown_timeout is not None
        super().__init__(
            spec,
            config.logs_specs,
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
            shutdown_timeout=config.shutdown_timeout,
        )
        self._graceful_shutdown = shutdown

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._graceful_shutdown.stop_requested:
            # Code that catches every error may have swallowed the exception of the signal handler.
            raise Preempted(RANKS_STOPPED)
        result: RunResult = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        # Torch lists first the rank that left by itself, then those that it told to leave.
        if next(iter(result.failures.values())).exitcode == ExitStatus.RESUMABLE:
            raise Preempted("a rank was told to stop and all have left; starting the run again resumes it")
        rank, failure = _first_failure(result.failures)
        if failure.exitcode == ExitStatus.WRONG_CONFIGURATION:
            raise ConfigError(_describe(rank, failure))
        if self._remaining_restarts > 0:
            logger.warning("%s; restarting all ranks", _describe(rank, failure))
        return result


def _first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the failure that caused the others, with its rank.

    Ranks that lose contact with it fail as well, perhaps in the same second. Torch tells the rest to stop, and kills
    those that do not within half a minute.
    """
    earliest = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        failure = failures[rank]
        was_stopped = failure.exitcode in (-signal.SIGTERM, ExitStatus.RESUMABLE)
        return was_stopped, failure.timestamp > earliest + SOON_S, failure.exitcode > 0, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def _describe(rank: int, failure: ProcessFailure) -> str:
    """Return the message for a failure, with the error that the rank has recorded."""
    if failure.exitcode < 0:
        hint = " (as by Linux when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {failure.signal_name()}{hint}"
    recorded = failure.error_file_data["message"]
    error = f": {recorded['message']}" if isinstance(recorded, Mapping) else ""
    return f"rank {rank} failed with exit status {failure.exitcode}{error}"


def _rendezvous_options(launch: LaunchConfig, environ: Mapping[str, str]) -> dict[str, object]:
    """Return the options of the rendezvous: those of the environment or, for a single node, a free local port."""
    for name, key, value in (
        ("PET_NNODES", "num_nodes", launch.num_nodes),
        ("PET_NPROC_PER_NODE", "num_processes", launch.num_processes),
    ):
        if environ.get(name, str(value)) != str(value):
            raise ConfigError(
                f"launch.{key}: {value} is not {name} = {environ[name]!r}; make them agree, or unset {name}"
            )
    if launch.num_nodes > 1 and not {"PET_RDZV_ENDPOINT", "PET_RDZV_ID"} <= environ.keys():
        raise ConfigError(
            f"launch.num_nodes: {launch.num_nodes} nodes need a rendezvous; set PET_RDZV_ENDPOINT to host:port of "
            "one of them and PET_RDZV_ID to a name of the run, the same on all"
        )
    if "PET_RDZV_ENDPOINT" in environ:
        # Torch's own default, static, cannot start all nodes again when a rank of one fails.
        return {} if "PET_RDZV_BACKEND" in environ else {"rdzv-backend": "c10d"}
    return {
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "127.0.0.1:0",
        "rdzv-id": uuid.uuid4(),
        "local-addr": "127.0.0.1",
    }


def _check_devices(launch: LaunchConfig, environment: Environment) -> None:
    """Refuse more processes than GPUs, where GPUs are used."""
    devices = torch.cuda.device_count()
    if environment.device in ("auto", "cuda") and 0 < devices < launch.num_processes:
        raise ConfigError(
            f"launch.num_processes: {launch.num_processes} is more than the {devices} GPUs of this machine; use "
            f"1..{devices}, or SFGRPO_DEVICE=cpu"
        )


def _silence_torch() -> None:
    """Leave messages to this module, unless LOGLEVEL, torch's own variable, is set."""
    if "LOGLEVEL" not in os.environ:
        for name in logging.root.manager.loggerDict:
            if f"{name}.".startswith("torch.distributed."):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        # In the ranks, stack traces of a lost connection would bury the message of this module.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
