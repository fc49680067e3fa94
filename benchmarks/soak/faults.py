"""What is done to the training and its servers, at random moments, and what became of it."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil  # type: ignore[import-untyped]

from benchmarks.soak.services import Service
from benchmarks.soak.training import GRACE_S, SoakError, Training, is_alive
from sfgrpo.bucket import Bucket
from sfgrpo.checkpoint import CHECKPOINTS
from sfgrpo.files import MANIFEST
from sfgrpo.preemption import LAUNCHER_MARGIN_S
from sfgrpo.status import ExitStatus

EARLY_SHARE = 0.25
"""The share of faults that do not wait until the training has recovered from the last one."""
EARLY_S = (0.5, 15.0)
FIRST_WORK_S = 5.0
"""The least that other faults let the training work after it has recovered."""
FROZEN_S = 10.0
OUTAGE_S = (5.0, 30.0)
GONE_S = 10.0
DELETED = "run killed, its state deleted"


@dataclasses.dataclass(slots=True, kw_only=True)
class Fault:
    """One thing that was done; times are those of `time.monotonic`."""

    kind: str
    at: float
    floor: int | None = None
    """The update after which the training has to go on, or a later one."""


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
        self._services = services
        self._timers: list[threading.Timer] = []
        self._kinds: Mapping[str, Callable[[Fault], None]] = {
            "rank killed": lambda fault: self._signal_rank(signal.SIGKILL),
            "rank told to stop (SIGTERM)": lambda fault: self._signal_rank(signal.SIGTERM),
            "rank frozen for 10 s": self._freeze_rank,
            "launcher killed": self._kill_launcher,
            "run told to stop (SIGTERM)": lambda fault: self._tell_launcher(signal.SIGTERM, fault),
            "run told to stop (SIGUSR1)": lambda fault: self._tell_launcher(signal.SIGUSR1, fault),
            DELETED: self._delete,
            **{f"{service.name} killed": self._outage_of(service) for service in services},
        }
        self._deck: list[str] = []

    def run(self) -> None:
        """Goes on until the training is done, and all servers are back."""
        training, chance = self._training, self._chance
        while training.done_at is None:
            if self.faults and chance.random() < EARLY_SHARE:
                pause_s = chance.uniform(*EARLY_S)
            else:
                training.wait(self._has_recovered)
                pause_s = FIRST_WORK_S + chance.expovariate(1 / max(self._mean_gap_s() - FIRST_WORK_S, 1.0))
            training.wait(lambda: False, pause_s)
            if training.done_at is None:
                self._inject()
        for timer in self._timers:
            timer.join()

    def stop(self) -> None:
        """Calls off what is still to come."""
        for timer in self._timers:
            timer.cancel()

    def _has_recovered(self) -> bool:
        updates = self._training.updates
        return bool(updates) and (not self.faults or updates[-1][0] > self.faults[-1].at)

    def _mean_gap_s(self) -> float:
        work_s = (self._training.num_updates - self._training.newest_update) * self._seconds_per_update
        return work_s / max(self._num_planned - len(self.faults), 1)

    def _inject(self) -> None:
        # Every kind comes up once before any comes up again, unless it is impossible at the moment.
        self._deck = self._deck or self._chance.sample(list(self._kinds), len(self._kinds))
        possible = [kind for kind in self._deck if self._is_possible(kind)]
        if not possible:
            self._training.wait(lambda: self._training.ranks(), 1.0)
            return
        kind = possible[0]
        self._deck.remove(kind)
        fault = Fault(kind=kind, at=time.monotonic())
        self.faults.append(fault)
        elapsed_s = fault.at - self._training.launches[0].started
        print(f"{elapsed_s:7.1f} s  {kind}, after update {self._training.newest_update}", flush=True)
        try:
            self._kinds[kind](fault)
        except (psutil.Error, ProcessLookupError):
            # It went away by itself meanwhile, so this was none.
            self.faults.remove(fault)
        self._training.touched = time.monotonic()

    def _is_possible(self, kind: str) -> bool:
        for service in self._services:
            if kind == f"{service.name} killed":
                return service.up
        # Before its ranks are there, the launcher is still being imported.
        return self._training.launcher is not None and bool(self._training.ranks())

    def _rank(self) -> psutil.Process:
        ranks = self._training.ranks()
        if not ranks:
            raise ProcessLookupError
        return self._chance.choice(ranks)

    def _launcher(self) -> psutil.Process:
        launcher = self._training.launcher
        if launcher is None:
            raise ProcessLookupError
        return launcher

    def _signal_rank(self, number: signal.Signals) -> None:
        self._rank().send_signal(number)

    def _freeze_rank(self, fault: Fault) -> None:
        rank = self._rank()
        rank.suspend()
        self._later(FROZEN_S, rank.resume)

    def _kill_launcher(self, fault: Fault) -> None:
        ranks, launcher = self._training.ranks(), self._launcher()
        launcher.kill()
        self._require_gone(ranks, "its launcher was killed")

    def _tell_launcher(self, number: signal.Signals, fault: Fault) -> None:
        training, launcher, launch = self._training, self._launcher(), self._training.launches[-1]
        ranks = training.ranks()
        # What was done since the last time that something happened to the processes must not be lost.
        fault.floor = max((update for at, update in training.updates if at > self._disturbed_at()), default=None)
        launcher.send_signal(number)
        limit_s = GRACE_S + LAUNCHER_MARGIN_S + 2.0
        if training.wait(lambda: launch.ended is not None, limit_s):
            if launch.status not in (ExitStatus.RESUMABLE, ExitStatus.DONE):
                self.complaints.append(f"{fault.kind}: the launcher ended with status {launch.status}")
        elif training.done_at is None:
            self.complaints.append(f"{fault.kind}: the launcher was still there after {limit_s:g} s")
            launcher.kill()
        self._require_gone(ranks, "its launcher was told to stop")

    def _disturbed_at(self) -> float:
        resumed_at = self._training.resumed[-1][0] if self._training.resumed else 0.0
        ours = [fault.at for fault in self.faults[:-1] if not self._is_outage(fault.kind)]
        return max([resumed_at, *ours])

    def _is_outage(self, kind: str) -> bool:
        return kind in [f"{service.name} killed" for service in self._services]

    def _delete(self, fault: Fault) -> None:
        training = self._training
        with training.held:
            launcher, ranks = self._launcher(), training.ranks()
            for process in (launcher, *ranks):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._require_gone([launcher, *ranks], "it was killed")
            if all(service.up for service in self._services):
                fault.floor = self._newest_mirrored()
            shutil.rmtree(training.folder / ".scratch")

    def _newest_mirrored(self) -> int | None:
        """Finds the newest whole checkpoint in the bucket."""
        (folder,) = (self._training.folder / ".scratch").iterdir()
        names = [name.split("/") for name in Bucket(f"{self._mirror}/{folder.name}").sizes()]
        updates = [parts[1] for parts in names if parts[0] == CHECKPOINTS and parts[-1] == MANIFEST]
        return max((int(update.removeprefix("update-")) for update in updates), default=None)

    def _outage_of(self, service: Service) -> Callable[[Fault], None]:
        def outage(fault: Fault) -> None:
            service.kill()
            self._later(self._chance.uniform(*OUTAGE_S), lambda: self._bring_back(service))

        return outage

    def _bring_back(self, service: Service) -> None:
        try:
            service.start()
        except SoakError as error:
            self.complaints.append(str(error))
        self._training.touched = time.monotonic()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                action()

        timer = threading.Timer(delay_s, act)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _require_gone(self, processes: Sequence[psutil.Process], reason: str) -> None:
        deadline = time.monotonic() + GONE_S
        while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            self.complaints.append(f"process {process.pid} was still there {GONE_S:g} s after {reason}")
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
