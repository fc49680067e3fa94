"""Tables of `benchmarks.update`: what was measured of each phase, and whole updates put together from phases."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sfgrpo.config.stages import TrainStage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of an update with its setting: one row of the first table for each of its phases."""

    stage: str
    """`rollout`, `score_final`, `score_states` or `update`."""
    guidance_scale: float
    num_substeps: int = 1
    kl_coef: float = 0.0
    micro_batch_size: int = 0

    @property
    def name(self) -> str:
        """Short name of the setting."""
        words = [self.stage, f"guidance {self.guidance_scale:g}"]
        words += [f"T'={self.num_substeps}"] if self.stage == "score_states" else []
        words += [f"KL {self.kl_coef:g}", f"micro-batch {self.micro_batch_size}"] if self.stage == "update" else []
        return ", ".join(words)


@dataclasses.dataclass(slots=True, kw_only=True)
class Timings:
    """What was measured of one phase of a part."""

    flops: float
    """Floating-point operations of all calls of the models."""
    ours_s: list[float] = dataclasses.field(default_factory=list)
    bare_s: list[float] = dataclasses.field(default_factory=list)
    peak_mb: float = 0.0

    def to_dict(self, ceiling: float) -> dict[str, Any]:
        """Return medians, their ratio, and the share of the machine's ceiling, in FLOP/s, that was reached."""
        ours, bare = statistics.median(self.ours_s), statistics.median(self.bare_s)
        return {
            "ours_s": ours,
            "ours_min_s": min(self.ours_s),
            "ours_max_s": max(self.ours_s),
            "bare_s": bare,
            "ratio": ours / bare if bare > 0 else None,
            "tflop": self.flops / 1e12,
            "share_of_ceiling": self.flops / ours / ceiling if ours > 0 else None,
            "peak_gb": self.peak_mb / 1024,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A whole update, put together from parts."""

    name: str
    parts: tuple[Part, ...]


def methods_of(config: TrainStage, *, full_scale: bool) -> list[Method]:
    """Return the updates that are compared, Flow-GRPO first in each setting."""
    size = config.update.micro_batch_size

    def method(name: str, guidance: float, substeps: int | None, kl: float, micro_batch: int = size) -> Method:
        scored = (
            Part(stage="score_final", guidance_scale=guidance)
            if substeps is None
            else Part(stage="score_states", guidance_scale=guidance, num_substeps=substeps)
        )
        update = Part(stage="update", guidance_scale=guidance, kl_coef=kl, micro_batch_size=micro_batch)
        setting = f"guidance {guidance:g}, KL {kl:g}, micro-batch {micro_batch}"
        rollout = Part(stage="rollout", guidance_scale=guidance)
        return Method(name=f"{name}, {setting}", parts=(rollout, scored, update))

    kl = config.update.kl_coef
    found = []
    for guidance in (1.0, 4.5):
        found.append(method("Flow-GRPO", guidance, None, kl))
        found += [method(f"Stepwise T'={substeps}", guidance, substeps, kl) for substeps in (1, 2, 5)]
    if full_scale:
        found.append(method("Flow-GRPO", 4.5, None, 0.0))
        found.append(method("Flow-GRPO", 4.5, None, kl, size // 2))
    return found


def results_of(
    timings: Mapping[tuple[Part, str], Timings], methods: Sequence[Method], num_images: int, ceiling: float
) -> dict[str, Any]:
    """Return the two tables as records: phases, and whole updates with the ratio to the first method."""
    phases = {f"{part.name}: {phase}": timing.to_dict(ceiling) for (part, phase), timing in timings.items()}
    updates = {}
    for method in methods:
        of_method = [(key, timing) for key, timing in timings.items() if key[0] in method.parts]
        seconds = {phase: statistics.median(timing.ours_s) for (_, phase), timing in of_method}
        bare = sum(statistics.median(timing.bare_s) for _, timing in of_method)
        total = sum(seconds.values())
        flops = sum(timing.flops for _, timing in of_method)
        updates[method.name] = {
            "seconds": seconds,
            "total_s": total,
            "over_bare": total / bare,
            "images_per_s": num_images / total,
            "share_of_ceiling": flops / total / ceiling,
        }
    return {"phases": phases, "updates": updates}


def tables_of(results: Mapping[str, Any]) -> str:
    """Lay the results out as two Markdown tables."""
    lines = [["Phase", "ours s", "bare s", "ratio", "TFLOP", "of ceiling", "peak GB"], ["---", *["---:"] * 6]]
    for name, row in results["phases"].items():
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = [f"{row['ours_s']:.3f}", f"{row['bare_s']:.3f}", ratio, f"{row['tflop']:.2f}"]
        lines.append([name, *numbers, f"{row['share_of_ceiling']:.0%}", f"{row['peak_gb']:.1f}"])
    tables = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    phases = ("rollout", "estimates", "decode", "reward", "update")
    lines = [["Update", *phases, "total s", "over bare", "images/s", "of ceiling"], ["---", *["---:"] * 9]]
    for name, row in results["updates"].items():
        cells = [f"{row['seconds'].get(phase, 0.0):.3f}" for phase in phases]
        cells += [f"{row['total_s']:.2f}", f"{row['over_bare']:.2f}", f"{row['images_per_s']:.2f}"]
        lines.append([name, *cells, f"{row['share_of_ceiling']:.0%}"])
    return "\n\n".join([*tables, "\n".join(f"| {' | '.join(line)} |" for line in lines)])
