"""The training under test: its working folder, and the process that is started again until it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import psutil

from sfgrpo.errors import ExitStatus
from sfgrpo.runtime.process import is_running
from sfgrpo.runtime.rank import LAUNCHER
from sfgrpo.types import TAGS

ROOT = Path(__file__).resolve().parents[2]
MARK = "SOAK_FOLDER"
"""Environment variable of every process that a soak starts."""
STALL_S = 120.0
"""A training without an update for this long after the last fault has failed."""
GRACE_S = 20.0
CLEAN = ("MLFLOW_", "SFGRPO_", "AWS_", "PET_", "TORCHELASTIC_")


class SoakError(Exception):
    """The soak cannot go on."""


def lay_out(folder: Path, num_updates: int) -> None:
    """Create a working folder with the shipped model, in which `python -m sfgrpo train` takes a second per update.

    The code is a copy, beside the folder: editing the repository must not disturb the soak.
    """
    code = folder.parent / "code"
    if not code.exists():
        shutil.copytree(ROOT / "sfgrpo", code / "sfgrpo", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "params.yaml", code)
    (folder / "models").mkdir(parents=True)
    (folder / "models/shapes-base").symlink_to(ROOT / "models/shapes-base")
    params = {
        "extends": "../code/params.yaml",
        "prompts": {"num_validation": dict.fromkeys(TAGS, 2), "num_evaluation": dict.fromkeys(TAGS, 4)},
        "rollout": {"prompts_per_update": 4, "group_size": 8, "micro_batch_size": 8},
        "estimates": {"num_substeps": 1},
        "update": {"num_updates": num_updates, "micro_batch_size": 8},
        "checkpoint": {"every_num_updates": 5},
        "evaluation": {"num_steps": 8, "images_per_prompt": 1, "micro_batch_size": 12}
        | {"every_num_updates": min(50, max(5, num_updates // 20 * 5))},
        "launch": {"num_processes": 2, "max_restarts": 1000},
    }
    # JSON is YAML.
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
    command = [sys.executable, "-m", "sfgrpo", "prompts"]
    subprocess.run(
        command, cwd=folder, env=environment_of(folder), check=True, stdout=subprocess.DEVNULL, timeout=STALL_S
    )


def environment_of(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process in a working folder: copied code, one thread, nothing of the caller."""
    # A launcher that is killed leaves its temporary folder behind.
    temporary = folder.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CLEAN)}
    own = {
        "PYTHONPATH": str(folder.parent / "code"),
        MARK: str(folder.parent),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    return kept | own | {"SFGRPO_DEVICE": "cpu", "SFGRPO_GRACE_S": f"{GRACE_S:g}"} | dict(more or {})


def processes_where(**variables: str) -> list[psutil.Process]:
    """Return the living processes whose environment has these values."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error, OSError):
            if variables.items() <= process.environ().items() and is_running(process):
                found.append(process)
    return found


@dataclasses.dataclass(slots=True, kw_only=True)
class Launch:
    """One start of the training's command."""

    process: subprocess.Popen[str]
    started: float
    ended: float | None = None
    status: int | None = None


class Training:
    """A training that is restarted whenever a signal, an error or a request ends it; times are in seconds."""

    def __init__(self, folder: Path, num_updates: int, more: Mapping[str, str] | None = None) -> None:
        self.folder, self.num_updates = folder, num_updates
        self.launches: list[Launch] = []
        self.updates: list[tuple[float, int]] = []
        """When each update was done; replayed updates appear again."""
        self.resumed: list[tuple[float, int]] = []
        """When a rank resumed, and after which update."""
        self.rank_restarts: list[float] = []
        self.held = threading.Lock()
        """Held to keep the training from being restarted."""
        self.touched = time.monotonic()
        """When the last fault was injected or the last update done."""
        self.done_at: float | None = None
        self._environment = environment_of(folder, more)
        self._log = folder.parent / f"{folder.name}.log"
        self._tail: deque[str] = deque(maxlen=25)
        self._failure: str | None = None
        self._stopping = False
        self._keeper = threading.Thread(target=self._keep, name=f"keeper of {folder.name}", daemon=True)
        self._keeper.start()

    @property
    def launcher(self) -> psutil.Process:
        """The process of the last launch, which may be dead; raises `psutil.NoSuchProcess` once it was reaped."""
        return psutil.Process(self.launches[-1].process.pid)

    @property
    def newest_update(self) -> int:
        return self.updates[-1][1] if self.updates else 0

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks of the last launch, even if their launcher is dead."""
        if not self.launches:
            return []
        launched = processes_where(**{LAUNCHER: str(self.launches[-1].process.pid), MARK: str(self.folder.parent)})
        # Ranks start other programs now and then, which inherit their environment.
        return [process for process in launched if "sfgrpo" in (process.info["cmdline"] or ())]

    def wait(self, condition: Callable[[], object], timeout_s: float = float("inf")) -> bool:
        """Wait until the condition holds, the training is done or the time is up; return whether the condition holds.

        Raises:
            SoakError: the training failed or makes no progress.
        """
        deadline = time.monotonic() + timeout_s
        while not (held := condition()) and self.done_at is None and time.monotonic() < deadline:
            if self._failure is not None:
                raise SoakError(self._failure)
            if time.monotonic() - self.touched > STALL_S:
                raise SoakError(self._with_tail(f"no progress for {STALL_S:g} s"))
            time.sleep(0.05)
        return bool(held)

    def finish(self) -> None:
        """Wait until the training is done."""
        self.wait(lambda: False)

    @property
    def seconds(self) -> float:
        """Seconds from the first launch to the end."""
        return (self.done_at or time.monotonic()) - self.launches[0].started

    @property
    def seconds_per_update(self) -> float:
        """Seconds of an update, evaluations and checkpoints included."""
        (first_at, first), (last_at, last) = self.updates[0], self.updates[-1]
        return (last_at - first_at) / (last - first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop restarting the training; the caller ends running processes by `MARK`."""
        with self.held:
            self._stopping = True

    def _keep(self) -> None:
        while self.done_at is None and self._failure is None:
            with self.held:
                if self._stopping:
                    return
                process = subprocess.Popen(
                    [sys.executable, "-m", "sfgrpo", "train"],
                    cwd=self.folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
                launch = Launch(process=process, started=time.monotonic())
                self.launches.append(launch)
            assert process.stdout is not None
            for line in process.stdout:
                self._note(line.rstrip())
            launch.status = process.wait()
            launch.ended = time.monotonic()
            self._note(f"--- the launch ended with status {launch.status}")
            if launch.status == ExitStatus.DONE:
                self.done_at = launch.ended
            elif launch.status > 0 and launch.status not in (ExitStatus.FAILED, ExitStatus.RESUMABLE):
                self._failure = self._with_tail(f"exit status {launch.status}")
            elif launch.status == ExitStatus.FAILED:
                time.sleep(1.0)

    def _note(self, line: str) -> None:
        now = time.monotonic()
        self._tail.append(line)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{now - self.launches[0].started:8.1f}  {line}\n")
        if match := re.match(r"update (\d+)/", line):
            self.updates.append((now, int(match[1])))
            self.touched = now
        elif match := re.search(r"resuming after update (\d+)", line):
            self.resumed.append((now, int(match[1])))
        elif "restarting all ranks" in line:
            self.rank_restarts.append(now)

    def _with_tail(self, complaint: str) -> str:
        return "\n".join((f"the training in {self.folder}: {complaint}; its log ends with", *self._tail))
