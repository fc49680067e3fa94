"""What a soak found, as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.soak.faults import DELETED, Fault
from benchmarks.soak.training import Training
from benchmarks.soak.verdicts import Verdict


def summary(undisturbed: Training, training: Training, faults: Sequence[Fault], found: Iterable[Verdict]) -> str:
    """Words faults, costs and verdicts."""
    num_replayed = len(training.updates) - len({update for _, update in training.updates})
    statuses = Counter(launch.status for launch in training.launches)
    launches = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items(), key=str))
    lines = [
        "# Soak",
        "",
        f"{training.num_updates} updates by two processes: {undisturbed.seconds:.0f} s undisturbed "
        f"({undisturbed.seconds_per_update:.2f} s an update), {training.seconds:.0f} s with {len(faults)} faults.",
        "",
        "| Fault | Number | Median s to the next update | Longest | What followed |",
        "|---|---:|---:|---:|---|",
        *_rows(training, faults),
        "",
        f"- updates replayed: {num_replayed}",
        f"- launches: {len(training.launches)}, by exit status {launches}",
        f"- all ranks started again by their launcher: {len(training.rank_restarts)} times",
        f"- median seconds from a launch to its first update: {_median(_starts(training))}",
        "",
        *(f"- {f'**BROKEN: {complaint}**' if complaint else 'holds'}: {what}" for what, complaint in found),
    ]
    return "\n".join(lines)


def recovery_complaints(training: Training, faults: Sequence[Fault]) -> list[str]:
    """Lists the faults after which the training went on from too early an update."""
    complaints = []
    for number, fault in enumerate(faults):
        resumed_at, update = next((each for each in training.resumed if each[0] > fault.at), (0.0, 0))
        # Whoever comes back only after his state was deleted owes nothing to an earlier fault.
        deleted = any(later.kind == DELETED and later.at < resumed_at for later in faults[number + 1 :])
        if fault.floor is not None and not deleted and update < fault.floor:
            complaints.append(f"{fault.kind}: went on after update {update}, not {fault.floor}")
    return complaints


def _rows(training: Training, faults: Sequence[Fault]) -> Iterator[str]:
    for kind in sorted({fault.kind for fault in faults}):
        own = [fault for fault in faults if fault.kind == kind]
        outcomes = Counter(_outcome(training, fault) for fault in own)
        waits = [at - fault.at for fault in own if (at := _next_update(training, fault)) is not None]
        longest = f"{max(waits):.1f}" if waits else "-"
        words = ", ".join(f"{outcome} ({number})" for outcome, number in outcomes.most_common())
        yield f"| {kind} | {len(own)} | {_median(waits)} | {longest} | {words} |"


def _outcome(training: Training, fault: Fault) -> str:
    """Tells what happened between a fault and the next update."""
    until = _next_update(training, fault) or float("inf")
    ended = [launch.status for launch in training.launches if launch.ended and fault.at < launch.ended < until]
    if any(status != 0 for status in ended):
        return "launched again after " + ", ".join(str(status) for status in ended)
    if any(fault.at < at < until for at in training.rank_restarts):
        return "ranks started again"
    return "went on"


def _next_update(training: Training, fault: Fault) -> float | None:
    return next((at for at, _ in training.updates if at > fault.at), None)


def _starts(training: Training) -> list[float]:
    """Lists the seconds from each launch that resumed to its first update."""
    starts = []
    for launch in training.launches[1:]:
        first = next((at for at, _ in training.updates if at > launch.started), None)
        if first is not None and (launch.ended is None or first < launch.ended):
            starts.append(first - launch.started)
    return starts


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}" if seconds else "-"
