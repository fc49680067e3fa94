"""Faults of the training and its servers, injected at random moments."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from benchmarks.soak.services import Service
from benchmarks.soak.training import GRACE_S, SoakError, Training
from sfgrpo.checkpoint.state import CHECKPOINTS
from sfgrpo.errors import ExitStatus
from sfgrpo.runtime.manifest import MANIFEST
from sfgrpo.runtime.process import is_running
from sfgrpo.runtime.shutdown import LAUNCHER_MARGIN_S
from sfgrpo.storage.s3 import Bucket

EARLY_SHARE = 0.25
"""The share of faults injected before the training has recovered from the last one."""
EARLY_S = (0.5, 15.0)
FIRST_WORK_S = 5.0
"""The least time that other faults leave the recovered training."""
FROZEN_S = 10.0
OUTAGE_S = (5.0, 30.0)
GONE_S = 10.0
LEAVE_S = GRACE_S + LAUNCHER_MARGIN_S + 2.0
DELETED = "run killed, its state deleted"


@dataclasses.dataclass(slots=True, kw_only=True)
class Fault:
    """One injected fault; times are those of `time.monotonic`."""

    kind: str
    update: int
    """The last update before it."""
    at: float
    over: float
    """When the processes that it ends had ended; later updates are those of their successors."""
    floor: int | None = None
    """The earliest update after which the training may resume."""


class Chaos:
    """Injects faults until the training is done: `num_planned`, spread over the updates that are left."""

    def __init__(
        self,
        training: Training,
        services: Sequence[Service],
        mirror: str,
        chance: random.Random,
        num_planned: int,
        seconds_per_update: float,
    ) -> None:
        self.faults: list[Fault] = []
        self.complaints: list[str] = []
        self._training, self._mirror, self._chance = training, mirror, chance
        self._num_planned, self._seconds_per_update = num_planned, seconds_per_update
        self._services = {f"{service.name} killed": service for service in services}
        self._kinds: Mapping[str, Callable[[Fault], None]] = {
            "rank killed": lambda fault: self._rank().kill(),
            "rank told to stop (SIGTERM)": lambda fault: self._tell(self._rank(), signal.SIGTERM, fault),
            "rank frozen for 10 s": self._freeze_rank,
            "launcher killed": self._kill_launcher,
            "run told to stop (SIGTERM)": lambda fault: self._tell(training.launcher, signal.SIGTERM, fault),
            "run told to stop (SIGUSR1)": lambda fault: self._tell(training.launcher, signal.SIGUSR1, fault),
            DELETED: self._delete,
            **dict.fromkeys(self._services, self._kill_service),
        }
        self._deck: list[str] = []
        self._timers: list[threading.Timer] = []

    def run(self) -> None:
        """Inject faults until the training is done and all servers are back."""
        training, chance = self._training, self._chance
        while training.done_at is None:
            if self.faults and chance.random() < EARLY_SHARE:
                pause_s = chance.uniform(*EARLY_S)
            else:
                training.wait(self._has_recovered)
                work_s = (training.num_updates - training.newest_update) * self._seconds_per_update
                mean_s = work_s / max(self._num_planned - len(self.faults), 1)
                pause_s = FIRST_WORK_S + chance.expovariate(1 / max(mean_s - FIRST_WORK_S, 1.0))
            training.wait(lambda: False, pause_s)
            if training.done_at is None:
                self._inject()
        for timer in self._timers:
            timer.join()

    def stop(self) -> None:
        """Cancel the scheduled restarts."""
        for timer in self._timers:
            timer.cancel()

    def _has_recovered(self) -> bool:
        updates = self._training.updates
        return bool(updates) and (not self.faults or updates[-1][0] > self.faults[-1].over)

    def _inject(self) -> None:
        # Every kind comes once before any comes again, unless it is impossible at the moment.
        self._deck = self._deck or self._chance.sample(list(self._kinds), len(self._kinds))
        # Without ranks, the launcher is still being imported.
        has_ranks = bool(self._training.ranks())
        possible = {kind: self._services[kind].up if kind in self._services else has_ranks for kind in self._deck}
        kind = next((kind for kind in self._deck if possible[kind]), "")
        if not kind:
            return
        self._deck.remove(kind)
        now = time.monotonic()
        fault = Fault(kind=kind, update=self._training.newest_update, at=now, over=now)
        self.faults.append(fault)
        print(f"{now - self._training.launches[0].started:7.1f} s  {kind}, after update {fault.update}", flush=True)
        try:
            self._kinds[kind](fault)
        except (psutil.Error, IndexError):
            print("           it was gone already; not counted", flush=True)
            self.faults.remove(fault)
        self._training.touched = time.monotonic()

    def _rank(self) -> psutil.Process:
        return self._chance.choice(self._training.ranks())

    def _freeze_rank(self, fault: Fault) -> None:
        rank = self._rank()
        rank.suspend()
        self._later(FROZEN_S, rank.resume)

    def _kill_launcher(self, fault: Fault) -> None:
        ranks = self._training.ranks()
        self._training.launcher.kill()
        self._require_gone(ranks, fault)

    def _tell(self, process: psutil.Process, number: signal.Signals, fault: Fault) -> None:
        """Ask the launcher or a rank to stop; the whole run must then save its state and exit."""
        training, launch, ranks = self._training, self._training.launches[-1], self._training.ranks()
        num_rank_restarts = len(training.rank_restarts)
        # Updates since the last fault of a process must not be lost.
        started = [at for at, _ in training.resumed[-1:]] + [launch.started]
        started += [earlier.at for earlier in self.faults[:-1] if earlier.kind not in self._services]
        fault.floor = max((update for at, update in training.updates if at > max(started)), default=None)
        process.send_signal(number)
        if training.wait(lambda: launch.ended or len(training.rank_restarts) > num_rank_restarts, LEAVE_S):
            # A rank that is still being imported dies of the signal, and all are started again.
            if launch.ended and launch.status not in (ExitStatus.RESUMABLE, ExitStatus.DONE):
                self.complaints.append(f"{fault.kind}: the launcher ended with status {launch.status}")
        elif training.done_at is None:
            self.complaints.append(f"{fault.kind}: the run was still there after {LEAVE_S:g} s")
        if launch.ended:
            self._require_gone(ranks, fault)
        fault.over = time.monotonic()

    def _delete(self, fault: Fault) -> None:
        training = self._training
        with training.held:
            processes = [training.launcher, *training.ranks()]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._require_gone(processes, fault)
            folders = list(training.folder.glob(".scratch/train-*")) if self._services["S3 killed"].up else []
            for folder in folders:
                names = [name.split("/") for name in Bucket(f"{self._mirror}/{folder.name}").sizes()]
                whole = [name[1] for name in names if name[0] == CHECKPOINTS and name[-1] == MANIFEST]
                fault.floor = max((int(update.removeprefix("update-")) for update in whole), default=None)
            shutil.rmtree(training.folder / ".scratch", ignore_errors=True)

    def _require_gone(self, processes: Sequence[psutil.Process], fault: Fault) -> None:
        deadline = time.monotonic() + GONE_S
        while (left := [process for process in processes if is_running(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            self.complaints.append(f"{fault.kind}: process {process.pid} was still there after {GONE_S:g} s")
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        fault.over = time.monotonic()

    def _kill_service(self, fault: Fault) -> None:
        service = self._services[fault.kind]
        service.kill()
        self._later(self._chance.uniform(*OUTAGE_S), service.start)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            try:
                action()
            except SoakError as error:
                self.complaints.append(str(error))
            except psutil.NoSuchProcess:
                pass
            self._training.touched = time.monotonic()

        self._timers.append(threading.Timer(delay_s, act))
        self._timers[-1].daemon = True
        self._timers[-1].start()
