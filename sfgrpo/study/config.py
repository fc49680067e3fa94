"""What a study compares: rows (one parameter file each), seeds, pairs of the two methods, and ablations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from sfgrpo.config.loading import read_mapping, unknown_key, validated
from sfgrpo.config.ranges import Count, Name, Seed
from sfgrpo.config.schema import section
from sfgrpo.config.stages import PromptsStage, TrainStage, load_config
from sfgrpo.errors import ConfigError

EXPERIMENTS = Path("experiments")
PLANS = EXPERIMENTS / "study.yaml"
ROWS = EXPERIMENTS / "shapes"


@section
class Pair:
    """Two rows that differ in `advantage.credit` only."""

    title: Name
    """What both have in common."""
    flow_grpo: Name
    """Row of the baseline."""
    stepwise: Name
    """Row of the method."""
    paper: tuple[Name, Name] | None = None
    """The same two in the paper's table."""


@section
class Ablation:
    """Rows that differ in one lever."""

    title: Name
    """The lever."""
    question: Name
    """The question that it answers, in one sentence."""
    rows: Annotated[tuple[Name, ...], MinLen(2)]
    """The rows, the default first."""


@section
class Plan:
    """One preset of the study."""

    preset: Name
    """Name of the preset."""
    seeds: Annotated[tuple[Seed, ...], MinLen(1)]
    """Seeds of every row."""
    num_updates: Count
    """Updates of every run."""
    evaluate_every_num_updates: Count
    """Updates between two evaluations, and between two checkpoints."""
    rows: Annotated[dict[Name, Name], MinLen(1)]
    """Parameter files in `ROWS`, without their ending, with their labels, in the order in which they run."""
    pairs: tuple[Pair, ...]
    """Comparisons of the two methods."""
    ablations: tuple[Ablation, ...]
    """Comparisons of levers."""

    def __post_init__(self) -> None:
        asked = [row for pair in self.pairs for row in (pair.flow_grpo, pair.stepwise)]
        asked += [row for ablation in self.ablations for row in ablation.rows]
        if stray := sorted(set(asked) ^ set(self.rows)):
            raise ValueError(
                f"rows: {', '.join(stray)} must be listed under rows and in a pair or an ablation, or nowhere"
            )


def load_plan(preset: str, path: Path = PLANS) -> Plan:
    """Read one preset of the study; raise `ConfigError` if there is none or its parts do not fit together."""
    presets = read_mapping(path)
    if preset not in presets:
        raise ConfigError(f"{path}: {preset}: {unknown_key(preset, list(presets))}")
    return validated(Plan, {"preset": preset, **presets[preset]}, f"{path}: {preset}")


def stages_of_run(plan: Plan, row: str, seed: int) -> tuple[PromptsStage, TrainStage]:
    """Return a row's parameters with the seed and the length of the plan."""
    if row not in plan.rows or seed not in plan.seeds:
        raise ConfigError(
            f"{PLANS}: {plan.preset} has no row {row} with seed {seed}; rows are {', '.join(plan.rows)}, "
            f"seeds {', '.join(map(str, plan.seeds))}"
        )
    path = ROWS / f"{row}.yaml"
    prompts, train = load_config(PromptsStage, path), load_config(TrainStage, path)
    every = plan.evaluate_every_num_updates
    return dataclasses.replace(prompts, seed=seed), dataclasses.replace(
        train,
        seed=seed,
        update=dataclasses.replace(train.update, num_updates=plan.num_updates),
        evaluation=dataclasses.replace(train.evaluation, every_num_updates=every),
        checkpoint=dataclasses.replace(train.checkpoint, every_num_updates=every),
    )
