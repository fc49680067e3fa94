"""The commands up, down, status and run of the stack."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import psutil
from rich.console import Console
from rich.table import Table

from infra.stack.clients import env_file
from infra.stack.credentials import ensure_secrets, write_private
from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import Folder, make_folder, open_folder, start_stop_lock
from infra.stack.orphans import end_orphans
from infra.stack.program import Program, Stack
from infra.stack.programs.table import PROGRAMS
from infra.stack.running import is_still_run, run
from infra.stack.settings import (
    Settings,
    dump_settings,
    open_doors,
    parse_settings,
    read_settings,
    require_free_ports,
    require_ordinary_user,
)
from infra.stack.supervision import (
    STOPPED_STATES,
    Process,
    Supervisor,
    running_supervisor,
    start_supervisor,
    write_configuration,
)
from sfgrpo.errors import ConfigError

HEALTH_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 180.0
MAX_STARTS = 3
"""Processes of a program that may die before its start counts as failed."""
NUM_SHOWN_LINES = 20
TABLE_WIDTH = 160
POLL_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """State of a program at a moment."""

    program: str
    state: str
    """State of supervisord; STOPPED also if there is no supervisord."""
    pid: int | None
    uptime_s: int | None
    health: str
    """`healthy`, or the problem."""
    address: str


def up() -> None:
    """Start everything that does not run, and wait until it is healthy; print a line for each program."""
    begin = time.monotonic()
    settings = read_settings()
    folder = open_folder(settings.folder)
    supervisor = running_supervisor(folder)
    if supervisor is not None:
        settings = _running_settings(folder, settings)
    require_ordinary_user(settings)
    running = _running(supervisor)
    missing = [program for program in PROGRAMS.values() if program.name not in running]
    require_free_ports(settings, [program.port for program in missing if program.port is not None])
    for program in missing:
        program.require(folder)
    make_folder(folder)
    with start_stop_lock(folder):
        stack = Stack(settings=settings, folder=folder, secrets=ensure_secrets(folder.secrets))
        write_private(folder.settings, dump_settings(settings))
        write_private(folder.env, env_file(stack))
        write_configuration(folder, PROGRAMS.values())
        if supervisor is None:
            _report_ended(end_orphans(folder))
            supervisor = start_supervisor(folder)
        supervisor.add_missing(PROGRAMS)
        _start_all(stack, supervisor, begin)
    print(_next_steps(stack, time.monotonic() - begin))
    _warn(settings)


def down() -> None:
    """Stop everything: first the flow runs of the worker, so that they can still report to Prefect how they ended."""
    folder = open_folder(read_settings().folder)
    supervisor = running_supervisor(folder)
    if not folder.private.exists():
        print(f"no stack in {folder.root}")
        return
    with start_stop_lock(folder):
        if supervisor is not None:
            for name, process in supervisor.processes().items():
                if name in PROGRAMS and PROGRAMS[name].keeps_children:
                    end_orphans(folder, name, spare=process.pid)
                    supervisor.stop(name)
            pid = supervisor.pid
            supervisor.shut_down()
            _wait_for_end(pid)
        _report_ended(end_orphans(folder))
    print(f"the stack in {folder.root} is stopped; its data are kept")


def status(*, as_json: bool) -> bool:
    """Print the state of each program, as a table or as JSON; return whether all are healthy."""
    found = statuses()
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
    else:
        _print_table(found)
    return all(entry.health == "healthy" for entry in found)


def statuses() -> list[Status]:
    """Return the state of every program, by supervisord and by health checks."""
    folder = open_folder(read_settings().folder)
    stack = _stack_of(folder)
    _warn(stack.settings)
    supervisor = running_supervisor(folder)
    processes = supervisor.processes() if supervisor is not None else {}
    return [_status(stack, program, processes.get(program.name)) for program in PROGRAMS.values()]


def run_program(name: str) -> None:
    """Replace this process by a program; called by supervisord."""
    run(_stack_of(open_folder(read_settings().folder)), PROGRAMS[name])


def _stack_of(folder: Folder) -> Stack:
    """Read the settings and secrets of a stack that was started before."""
    if not folder.settings.exists():
        raise StackError(f"there is no stack in {folder.root}; start one by `make stack`, or set STACK_DIR")
    settings = parse_settings(folder.root, folder.settings.read_text(encoding="utf-8"))
    return Stack(settings=settings, folder=folder, secrets=ensure_secrets(folder.secrets))


def _running_settings(folder: Folder, given: Settings) -> Settings:
    """Read the settings of the running stack; raise `ConfigError` if others were given now."""
    settings = _stack_of(folder).settings
    running = json.loads(dump_settings(settings))
    for variable, value in given.chosen.items():
        if variable in running and running[variable] != value:
            raise ConfigError(
                f"environment: {variable}: the stack in {folder.root} runs with {running[variable]}, not {value}; "
                "`make stack-down` first"
            )
    return settings


def _running(supervisor: Supervisor | None) -> set[str]:
    processes = supervisor.processes() if supervisor is not None else {}
    return {name for name, process in processes.items() if process.state not in STOPPED_STATES}


def _start_all(stack: Stack, supervisor: Supervisor, begin: float) -> None:
    """Start each program as soon as those that it needs are healthy, until all are."""
    healthy: set[str] = set()
    starts: dict[str, set[float]] = {name: set() for name in PROGRAMS}
    deadline = time.monotonic() + HEALTH_TIMEOUT_S
    while len(healthy) < len(PROGRAMS):
        processes = supervisor.processes()
        for program in PROGRAMS.values():
            if program.name in healthy or not healthy.issuperset(program.needs):
                continue
            process = processes[program.name]
            if process.state in STOPPED_STATES and not starts[program.name]:
                supervisor.start(program.name)
                starts[program.name].add(0.0)
                deadline = time.monotonic() + HEALTH_TIMEOUT_S
            elif problem := _problem(stack, program, process, program.initialise):
                starts[program.name].add(process.started_at)
                if len(starts[program.name]) > MAX_STARTS or time.monotonic() > deadline:
                    raise StackError(_failure(stack, program, problem))
            else:
                healthy.add(program.name)
                passed_s = time.monotonic() - begin
                print(f"{program.name:10}healthy after {passed_s:3.0f} s   {program.address(stack)}", flush=True)
        time.sleep(POLL_S)


def _problem(
    stack: Stack, program: Program, process: Process, then: Callable[[Stack], None] = lambda stack: None
) -> str:
    """Return why a program is not healthy, or why `then` fails; empty if all is well."""
    if process.state != "RUNNING":
        return "it does not run"
    if is_still_run(process.pid):
        return "it waits for the programs that it needs"
    try:
        program.check(stack)
        if program.last_heartbeat(stack) < process.started_at:
            return "it has not reported to Prefect"
        then(stack)
    except UnhealthyError as error:
        return str(error)
    return ""


def _status(stack: Stack, program: Program, process: Process | None) -> Status:
    is_running = process is not None and process.pid != 0
    return Status(
        program=program.name,
        state=process.state if process is not None else "STOPPED",
        pid=process.pid if process is not None and is_running else None,
        uptime_s=int(time.time() - process.started_at) if process is not None and is_running else None,
        health=(_problem(stack, program, process) if process is not None else "it does not run") or "healthy",
        address=program.address(stack),
    )


def _print_table(found: Sequence[Status]) -> None:
    table = Table("program", "state", "pid", "uptime", "health", "address", box=None, pad_edge=False)
    for entry in found:
        uptime = "-" if entry.uptime_s is None else f"{entry.uptime_s} s"
        table.add_row(entry.program, entry.state, str(entry.pid or "-"), uptime, entry.health, entry.address)
    Console(width=TABLE_WIDTH, highlight=False).print(table)


def _failure(stack: Stack, program: Program, problem: str) -> str:
    log = stack.folder.log(program.name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    shown = "\n".join(f"  {line}" for line in lines[-NUM_SHOWN_LINES:])
    return f"{program.name} does not become healthy: {problem}; the last lines of {log} are\n{shown}"


def _next_steps(stack: Stack, seconds: float) -> str:
    env = os.path.relpath(stack.folder.env)
    lines = [
        f"\nThe stack is up, after {seconds:.0f} s. Next:",
        f"  {f'. {env}':36}points this shell to it",
        f"  {'make deploy':36}registers the deployments, which the worker then runs",
    ]
    lines += [
        f"  {PROGRAMS[name].address(stack):36}{title}" for name, title in (("prefect", "Prefect"), ("mlflow", "MLflow"))
    ]
    if stack.settings.auth:
        lines.append(
            f"  Both ask for a login, which is in {env}: Prefect for all of PREFECT_API_AUTH_STRING in one field,"
        )
        lines.append("  MLflow for MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.")
    return "\n".join(lines)


def _warn(settings: Settings) -> None:
    """Print what the settings leave open to the error stream."""
    for warning in open_doors(settings):
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        try:
            psutil.Process(pid).wait(SHUTDOWN_TIMEOUT_S)
        except psutil.TimeoutExpired as error:
            raise StackError(f"supervisord, process {pid}, has not ended in {SHUTDOWN_TIMEOUT_S:.0f} s") from error


def _report_ended(pids: Sequence[int]) -> None:
    if pids:
        print(f"ended {len(pids)} processes of an earlier stack")
