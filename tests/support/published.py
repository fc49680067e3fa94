"""Snapshots and evaluations of a few bytes, as a training publishes and a store keeps them; needs no heavy library."""

from __future__ import annotations

import json
from pathlib import Path

from sfgrpo.checkpoint.snapshots import Snapshot, list_snapshots, publish_snapshot
from sfgrpo.evaluation.store import EVALUATIONS
from sfgrpo.runtime.manifest import write_manifest

METRICS = {"geneval/overall": 0.25, "geneval/overall_stderr": 0.05, "geneval/num_images": 8.0, "evaluation/light": 0.5}


def publish(run: Path, update: int) -> Snapshot:
    """Publish an adapter."""

    def save(folder: Path) -> None:
        (folder / "adapter").write_bytes(bytes([update]))

    return publish_snapshot(run, update, "fingerprint", "0123", save)


def keep(run: Path, update: int, **changes: float) -> None:
    """Put an evaluation of a snapshot into the store."""
    (snapshot,) = [each for each in list_snapshots(run) if each.update == update]
    partial = run.parent / f"partial-{update}"
    partial.mkdir()
    (partial / "metrics.json").write_text(json.dumps(METRICS | changes))
    write_manifest(partial)
    (run.parent / EVALUATIONS).mkdir(exist_ok=True)
    partial.rename(run.parent / EVALUATIONS / snapshot.key)
