"""Starts, watches and stops the stack as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence

import psutil

from infra.stack.clients import env_file
from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import Folder, alone, make_folder, open_folder
from infra.stack.orphans import end_leftovers
from infra.stack.program import Program, Stack
from infra.stack.running import is_still_run, run
from infra.stack.secrets import ensure_secrets, write_private
from infra.stack.settings import Settings, dump_settings, parse_settings, read_settings, require_free_ports
from infra.stack.supervision import (
    STOPPED_STATES,
    Process,
    Supervisor,
    running_supervisor,
    start_supervisor,
    write_configuration,
)
from infra.stack.table import PROGRAMS
from sfgrpo.errors import ConfigError

HEALTH_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 180.0
MAX_STARTS = 3
"""Processes of a program that may die before it counts as one that does not start."""
NUM_SHOWN_LINES = 20
POLL_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is known of a program at a moment."""

    program: str
    state: str
    """In supervisord's words; STOPPED also where there is no supervisord."""
    pid: int | None
    uptime_s: int | None
    health: str
    """`healthy`, or what is wrong."""
    address: str


def up() -> None:
    """Starts whatever does not run, and waits until everything is healthy; prints a line for each program."""
    begin = time.monotonic()
    settings = read_settings()
    folder = open_folder(settings.folder)
    supervisor = running_supervisor(folder)
    if supervisor is not None:
        settings = _remembered(folder, settings)
    running = _running(supervisor)
    missing = [program for program in PROGRAMS.values() if program.name not in running]
    require_free_ports(settings, [program.port for program in missing if program.port is not None])
    for program in missing:
        program.require(folder)
    make_folder(folder)
    with alone(folder):
        stack = Stack(settings=settings, folder=folder, secrets=ensure_secrets(folder.secrets))
        write_private(folder.settings, dump_settings(settings))
        write_private(folder.env, env_file(stack))
        write_configuration(folder, PROGRAMS.values())
        if supervisor is None:
            _tell_ended(end_leftovers(folder))
            supervisor = start_supervisor(folder)
        supervisor.add_missing(PROGRAMS)
        _start_all(stack, supervisor, begin)
    print(_farewell(stack, time.monotonic() - begin))


def down() -> None:
    """Stops everything: first what the worker has started, which so can still tell Prefect how it ended."""
    folder = open_folder(read_settings().folder)
    supervisor = running_supervisor(folder)
    if not folder.private.exists():
        print(f"no stack in {folder.root}")
        return
    with alone(folder):
        if supervisor is not None:
            for name, process in supervisor.processes().items():
                if name in PROGRAMS and PROGRAMS[name].children_outlive:
                    end_leftovers(folder, name, but=process.pid)
                    supervisor.stop(name)
            pid = supervisor.pid
            supervisor.shut_down()
            _wait_for_end(pid)
        _tell_ended(end_leftovers(folder))
    print(f"the stack in {folder.root} is stopped; its data are kept")


def status(*, as_json: bool) -> bool:
    """Prints how each program is, as a table or as JSON; tells whether all are healthy."""
    found = statuses()
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
    else:
        print(_table(found))
    return all(entry.health == "healthy" for entry in found)


def statuses() -> list[Status]:
    """Asks supervisord and every program how they are."""
    folder = open_folder(read_settings().folder)
    stack = _stack_of(folder)
    supervisor = running_supervisor(folder)
    processes = supervisor.processes() if supervisor is not None else {}
    return [_status(stack, program, processes.get(program.name)) for program in PROGRAMS.values()]


def run_program(name: str) -> None:
    """Becomes the program of that name; called by supervisord."""
    run(_stack_of(open_folder(read_settings().folder)), PROGRAMS[name])


def _stack_of(folder: Folder) -> Stack:
    """Reads the set-up of a stack that was started before."""
    if not folder.settings.exists():
        raise StackError(f"there is no stack in {folder.root}; start one by `make stack`, or set STACK_DIR")
    settings = parse_settings(folder.root, folder.settings.read_text(encoding="utf-8"))
    return Stack(settings=settings, folder=folder, secrets=ensure_secrets(folder.secrets))


def _remembered(folder: Folder, given: Settings) -> Settings:
    """Reads the settings of the stack that runs; raises `ConfigError` if others were given now."""
    remembered = _stack_of(folder).settings
    running = json.loads(dump_settings(remembered))
    for variable, value in given.chosen.items():
        if variable in running and running[variable] != value:
            raise ConfigError(
                f"environment: {variable}: the stack in {folder.root} runs with {running[variable]}, not {value}; "
                "`make stack-down` first"
            )
    return remembered


def _running(supervisor: Supervisor | None) -> set[str]:
    processes = supervisor.processes() if supervisor is not None else {}
    return {name for name, process in processes.items() if process.state not in STOPPED_STATES}


def _start_all(stack: Stack, supervisor: Supervisor, begin: float) -> None:
    """Starts each program as soon as those it needs are healthy, until all are."""
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
            elif problem := _problem(stack, program, process, program.fill):
                starts[program.name].add(process.started_at)
                if len(starts[program.name]) > MAX_STARTS or time.monotonic() > deadline:
                    raise StackError(_obituary(stack, program, problem))
            else:
                healthy.add(program.name)
                passed_s = time.monotonic() - begin
                print(f"{program.name:10}healthy after {passed_s:3.0f} s   {program.address(stack)}", flush=True)
        time.sleep(POLL_S)


def _problem(
    stack: Stack, program: Program, process: Process, then: Callable[[Stack], None] = lambda stack: None
) -> str:
    """Says why a program is not healthy, or cannot do what it is to do then; empty when all is well."""
    if process.state != "RUNNING":
        return "it does not run"
    if is_still_run(process.pid):
        return "it waits for what it needs"
    try:
        program.check(stack, process.started_at)
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


def _table(found: Sequence[Status]) -> str:
    rows = [("program", "state", "pid", "uptime", "health", "address")]
    rows += [
        (
            entry.program,
            entry.state,
            str(entry.pid or "-"),
            "-" if entry.uptime_s is None else f"{entry.uptime_s} s",
            entry.health,
            entry.address,
        )
        for entry in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _obituary(stack: Stack, program: Program, problem: str) -> str:
    log = stack.folder.log(program.name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    shown = "\n".join(f"  {line}" for line in lines[-NUM_SHOWN_LINES:])
    return f"{program.name} does not become healthy: {problem}; the last lines of {log} are\n{shown}"


def _farewell(stack: Stack, seconds: float) -> str:
    env = os.path.relpath(stack.folder.env)
    lines = [
        f"\nThe stack is up, after {seconds:.0f} s. Next:",
        f"  {f'. {env}':36}lets what this shell starts use it",
        f"  {'make deploy':36}registers the deployments, which the worker then runs",
    ]
    lines += [
        f"  {PROGRAMS[name].address(stack):36}{title}" for name, title in (("prefect", "Prefect"), ("mlflow", "MLflow"))
    ]
    if stack.settings.asks_for_credentials:
        lines.append(f"  Both ask for credentials, which are in {env}.")
    return "\n".join(lines)


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        try:
            psutil.Process(pid).wait(SHUTDOWN_TIMEOUT_S)
        except psutil.TimeoutExpired as error:
            raise StackError(f"supervisord, process {pid}, has not ended in {SHUTDOWN_TIMEOUT_S:.0f} s") from error


def _tell_ended(pids: Sequence[int]) -> None:
    if pids:
        print(f"ended what was left of an earlier stack: {len(pids)} processes")
