"""The results of a soak as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.soak.faults import DELETED, Fault
from benchmarks.soak.training import Training
from benchmarks.soak.verdicts import Verdict


def summary(undisturbed: Training, training: Training, faults: Sequence[Fault], found: Sequence[Verdict]) -> str:
    """Format verdicts, costs and faults."""
    launches, started = training.launches, training.launches[0].started
    statuses = Counter(str(launch.status) for launch in launches)
    waits = [_first_update(training, launch.started, launch.ended) for launch in launches[1:]]
    lines = [
        f"# Soak: {'failed' if any(complaint for _, complaint in found) else 'passed'}",
        "",
        f"{training.num_updates} updates by two processes: {undisturbed.seconds:.0f} s undisturbed "
        f"({undisturbed.seconds_per_update:.2f} s an update), {training.seconds:.0f} s with {len(faults)} faults.",
        "",
        "| Fault | Number | Median s to the next update | Longest | What followed |",
        "|---|---:|---:|---:|---|",
        *_rows(training, faults),
        "",
        f"- updates replayed: {len(training.updates) - len({update for _, update in training.updates})}",
        f"- launches: {len(launches)}, by exit status {', '.join(f'{s}: {n}' for s, n in sorted(statuses.items()))}",
        f"- all ranks started again by their launcher: {len(training.rank_restarts)} times",
        f"- median seconds from a launch to its first update on resume: {_median(waits)}",
        "",
        *(f"- {f'**BROKEN: {complaint}**' if complaint else 'holds'}: {what}" for what, complaint in found),
        "",
        "| At s | Fault | After update | What followed | s to the next update |",
        "|---:|---|---:|---|---:|",
        *(
            f"| {fault.at - started:.1f} | {fault.kind} | {fault.update} | {_outcome(training, fault)} "
            f"| {_median([_wait(training, fault)])} |"
            for fault in faults
        ),
    ]
    return "\n".join(lines)


def recovery_complaints(training: Training, faults: Sequence[Fault]) -> Iterator[str]:
    """Yield a complaint for every fault after which the training resumed too early."""
    for number, fault in enumerate(faults):
        resumed_at, update = next((each for each in training.resumed if each[0] > fault.over), (0.0, 0))
        # If the state is deleted before the run resumes, no earlier update is demanded of it.
        deleted = any(later.kind == DELETED and later.at < resumed_at for later in faults[number + 1 :])
        if fault.floor is not None and not deleted and update < fault.floor:
            yield f"{fault.kind}: resumed after update {update}, not {fault.floor}"


def _rows(training: Training, faults: Sequence[Fault]) -> Iterator[str]:
    for kind in sorted({fault.kind for fault in faults}):
        own = [fault for fault in faults if fault.kind == kind]
        waits = [_wait(training, fault) for fault in own]
        outcomes = Counter(_outcome(training, fault) for fault in own).most_common()
        longest = _median([max((wait for wait in waits if wait is not None), default=None)])
        words = ", ".join(f"{outcome}: {number}" for outcome, number in outcomes)
        yield f"| {kind} | {len(own)} | {_median(waits)} | {longest} | {words} |"


def _wait(training: Training, fault: Fault) -> float | None:
    wait_s = _first_update(training, fault.over, None)
    return None if wait_s is None else fault.over - fault.at + wait_s


def _outcome(training: Training, fault: Fault) -> str:
    """Describe what happened between a fault and the next update."""
    until = fault.at + (_wait(training, fault) or float("inf"))
    ended = [launch.status for launch in training.launches if launch.ended and fault.at < launch.ended < until]
    if ended and ended[0] != 0:
        return f"launched again after status {ended[0]}"
    if any(fault.at < at < until for at in training.rank_restarts):
        return "ranks started again"
    return "went on"


def _first_update(training: Training, after: float, before: float | None) -> float | None:
    """Return the seconds from one moment to the next update; None if that is not before another moment."""
    at = next((at for at, _ in training.updates if at > after), None)
    return None if at is None or (before is not None and at > before) else at - after


def _median(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{statistics.median(known):.1f}" if known else "-"
