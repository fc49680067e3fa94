"""Starts a training as several processes, its ranks, on one node or more, by torch's elastic launcher.

The launcher is the `python -m sfgrpo train` of each node. It starts the ranks, which are the same command again, starts
all of them again when one fails, and passes the request to stop on to them. Nodes find one another as under torchrun,
by the environment variables PET_RDZV_ENDPOINT, PET_RDZV_ID and the like; torchrun itself may start the ranks as well.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import uuid
from collections.abc import Iterable, Mapping, Sequence

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
from sfgrpo.runtime.shutdown import KILL_MARGIN_S, GracefulShutdown

logger = logging.getLogger(__name__)

SOON_S = 5
"""Failures of so many seconds have one cause."""


def launch_ranks(
    launch: LaunchConfig, environment: Environment, arguments: Sequence[str], shutdown: GracefulShutdown
) -> None:
    """Runs this Python with `arguments` as every rank of this node, and returns once all are done.

    The shutdown is not deferred: told to stop, this tells the ranks to and waits for them.

    Raises:
        Preempted: this process or a rank was told to stop, or the other nodes are out of reach.
        ConfigError: the launch does not fit the machine, or a rank refused its configuration.
        SfgrpoError: ranks failed more often than `launch.max_restarts`, or the run has ended on another node.
    """
    _check_devices(launch, environment)
    rendezvous = _rendezvous_options(launch, os.environ)
    _quieten_torch()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // launch.num_processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    # Torch would keep one store over all restarts: ranks find addresses of dead ones there, and a node that comes back
    # never learns where it is, https://github.com/pytorch/pytorch/issues/135712.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with temporary_directory(environment.scratch_dir, "ranks") as folder:
        options = {
            **rendezvous,
            "nnodes": launch.num_nodes,
            "nproc-per-node": launch.num_processes,
            "max-restarts": launch.max_restarts,
            # Ours handle the others.
            "signals-to-handle": "SIGQUIT",
            "shutdown-timeout": math.ceil(environment.grace_s) + KILL_MARGIN_S,
        }
        if "PET_LOG_DIR" not in os.environ:
            options["log-dir"] = folder.resolve()
        words = [f"--{name}={value}" for name, value in options.items()]
        config, command, rest = config_from_args(get_args_parser().parse_args([*words, *arguments]))
        try:
            _run(config, str(command), rest, shutdown)
        except SignalException as error:
            raise Preempted("the ranks were ended at once; starting the run again goes on") from error
        except RendezvousClosedError as error:
            raise SfgrpoError("the run has ended on another node; the output there says how") from error
        except (RendezvousError, DistError) as error:
            cause = f"{type(error).__name__} {error}".strip()
            raise Preempted(f"the other nodes are out of reach ({cause}); starting the run again goes on") from error


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
    # The other nodes see by this that the run is over. One that is preempted leaves it open, for its return.
    rendezvous.shutdown()
    if result.is_failed():
        rank, failure = _first_failure(result.failures)
        raise SfgrpoError(
            f"{_worded(rank, failure)}; all ranks had been started again {config.max_restarts} times "
            "(launch.max_restarts), and their output above says more"
        )


class _Agent(LocalElasticAgent):
    """Torch's agent, which watches the ranks of a node; it tells failures from ranks that left as they should."""

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
            # Code that catches every error may have caught the one that the shutdown raised.
            raise Preempted("the run was told to stop; starting it again goes on from its last checkpoint")
        result: RunResult = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        # Torch lists first who left by itself, then who did when torch told the others to.
        if next(iter(result.failures.values())).exitcode == ExitStatus.RESUMABLE:
            raise Preempted("a rank was told to stop and all have left; starting the run again goes on")
        rank, failure = _first_failure(result.failures)
        if failure.exitcode == ExitStatus.WRONG_CONFIGURATION:
            raise ConfigError(_worded(rank, failure))
        if self._remaining_restarts > 0:
            logger.warning("%s; starting all ranks again", _worded(rank, failure))
        return result


def _first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Picks the failure that caused the others.

    Ranks that miss the failed one fail by themselves, perhaps in the same second. Torch tells the rest to stop, and
    kills those that do not within half a minute.
    """
    earliest = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        failure = failures[rank]
        told = failure.exitcode in (-signal.SIGTERM, ExitStatus.RESUMABLE)
        return told, failure.timestamp > earliest + SOON_S, failure.exitcode > 0, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def _worded(rank: int, failure: ProcessFailure) -> str:
    """Words a failure, with the error that the rank has noted."""
    if failure.exitcode < 0:
        hint = " (as by Linux when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {failure.signal_name()}{hint}"
    told = failure.error_file_data["message"]
    error = f": {told['message']}" if isinstance(told, Mapping) else ""
    return f"rank {rank} failed with exit status {failure.exitcode}{error}"


def _rendezvous_options(launch: LaunchConfig, environ: Mapping[str, str]) -> dict[str, object]:
    """Says where the nodes meet: where the environment says so or, for a single node, on a free port of its own."""
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
            f"launch.num_nodes: {launch.num_nodes} nodes need a place to meet; set PET_RDZV_ENDPOINT to host:port of "
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
    """Refuses more processes than GPUs, where these are used."""
    devices = torch.cuda.device_count()
    if environment.device in ("auto", "cuda") and 0 < devices < launch.num_processes:
        raise ConfigError(
            f"launch.num_processes: {launch.num_processes} is more than the {devices} GPUs of this machine; use "
            f"1..{devices}, or SFGRPO_DEVICE=cpu"
        )


def _quieten_torch() -> None:
    """Leaves it to this module to word what happens, unless LOGLEVEL, torch's own variable, asks for more."""
    if "LOGLEVEL" not in os.environ:
        for name in _loggers_below("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # For the ranks, whose stack traces of a lost connection would bury what this module says of it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _loggers_below(name: str) -> Iterable[str]:
    return [other for other in logging.root.manager.loggerDict if f"{other}.".startswith(f"{name}.")]
