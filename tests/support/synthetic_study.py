"""A made-up study on the disk, with curves as trainings draw them: two pairs, two ablations, three seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sfgrpo.types import TAGS

SEEDS = (0, 1, 2)
UPDATES = 60
EVERY = 10
STEPS = 8
BASE = {"clip": 0.262, "geneval": 0.34}
RISE = {"clip": 0.034, "geneval": 0.16}
TASKS = (0.79, 0.19, 0.10, 0.76, 0.07, 0.12)
SECONDS = {"rollout": 1.6, "estimates": 1.5, "decode": 0.7, "reward": 0.5, "update": 2.3}

ROWS: dict[str, dict[str, Any]] = {
    "flow_grpo_cfg1": {"label": "Flow-GRPO, cfg 1", "speed": 1.0, "reward": "clip", "guidance": 1.0},
    "stepwise_cfg1": {"label": "Stepwise, cfg 1", "speed": 2.3, "reward": "clip", "guidance": 1.0},
    "flow_grpo_geneval": {"label": "Flow-GRPO, GenEval", "speed": 1.0, "reward": "geneval", "guidance": 4.5},
    "stepwise_geneval": {"label": "Stepwise, GenEval", "speed": 1.5, "reward": "geneval", "guidance": 4.5},
    "stepwise_per_step": {"label": "Stepwise, each step alone", "speed": 0.8, "credit": "per_step"},
    "stepwise_step_mean": {"label": "Stepwise, step means", "speed": 2.25, "credit": "step_mean"},
    "stepwise_5_substeps": {"label": "Stepwise, 5 substeps", "speed": 2.35, "num_substeps": 5},
    "stepwise_1_substep": {"label": "Stepwise, Tweedie alone", "speed": 2.2, "num_substeps": 1},
    "stepwise_ddim": {"label": "Stepwise, DDIM-like", "speed": 2.6, "sampler": "ddim_sde"},
}


def make_plan(seeds: tuple[int, ...] = SEEDS) -> Any:
    """Return a plan over all rows."""
    pairs = (
        SimpleNamespace(
            title="CLIP reward, guidance 1",
            flow_grpo="flow_grpo_cfg1",
            stepwise="stepwise_cfg1",
            paper=("Flow-GRPO cfg 1.0 PickScore", "Stepwise cfg 1.0 PickScore"),
        ),
        SimpleNamespace(
            title="GenEval reward, guidance 4.5",
            flow_grpo="flow_grpo_geneval",
            stepwise="stepwise_geneval",
            paper=("Flow-GRPO cfg 4.5 GenEval, 400 GPU h", "Stepwise cfg 4.5 GenEval, 400 GPU h"),
        ),
    )
    ablations = (
        SimpleNamespace(
            title="What normalises the gains",
            question="Do gains need one mean and one deviation for all steps of a group?",
            rows=("stepwise_cfg1", "stepwise_per_step", "stepwise_step_mean"),
        ),
        SimpleNamespace(
            title="Substeps of a clean estimate",
            question="How well must a clean image be estimated for its reward to guide?",
            rows=("stepwise_cfg1", "stepwise_1_substep", "stepwise_5_substeps"),
        ),
        SimpleNamespace(
            title="Sampler",
            question="Does the DDIM-like sampler help?",
            rows=("stepwise_cfg1", "stepwise_ddim"),
        ),
    )
    return SimpleNamespace(preset="synthetic", seeds=seeds, pairs=pairs, ablations=ablations)


def write_study(folder: Path, rows: tuple[str, ...] = tuple(ROWS), seeds: tuple[int, ...] = SEEDS) -> Path:
    """Write the runs of some rows and seeds; a run does not depend on what else is written."""
    for row in rows:
        for seed in seeds:
            write_run(folder / row / str(seed), row, seed)
    return folder


def write_run(path: Path, row: str, seed: int) -> None:
    """Write one finished run."""
    path.mkdir(parents=True)
    run = describe(row, seed)
    generator = np.random.default_rng([seed, list(ROWS).index(row)])
    shared = np.random.default_rng([seed, 99])
    history = make_history(run, generator, shared)
    _write(path / "run.json", run)
    _write(path / "history.json", history)
    _write(path / "evaluations.json", make_evaluations(run, generator))
    np.savez_compressed(path / "samples.npz", **make_samples(run, generator))


def describe(row: str, seed: int) -> dict[str, Any]:
    """Return the `run.json` of a row."""
    look = ROWS[row]
    stepwise = row.startswith("stepwise")
    sampler, guidance = look.get("sampler", "flow_sde"), look.get("guidance", 1.0)
    return {
        "row": row,
        "seed": seed,
        "method": "stepwise" if stepwise else "flow_grpo",
        "label": look["label"],
        "guidance_scale": guidance,
        "reward": look.get("reward", "clip"),
        "sampler": sampler,
        "credit": look.get("credit", "joint") if stepwise else "terminal",
        "num_substeps": look.get("num_substeps", 2),
        "num_updates": UPDATES,
        "images_per_update": 192,
        "num_steps": STEPS,
        "mlflow_run_id": "0" * 32,
        "params": {
            "sampling.guidance_scale": guidance,
            "sampling.noise_level": 0.7,
            "sampling.num_steps": STEPS,
            "prompts.num_evaluation.colors": 16,
            "prompts.num_evaluation.counting": 6,
            "evaluation.images_per_prompt": 4,
            "evaluation.num_steps": 20,
        },
    }


def level(run: dict[str, Any], update: np.ndarray | float) -> Any:
    """Return the reward that a policy has at an update, without noise."""
    speed = ROWS[run["row"]]["speed"]
    rise = RISE[run["reward"]] * (1.0 + 0.12 * (speed - 1.0))
    return BASE[run["reward"]] + rise * (1.0 - np.exp(-np.asarray(update) * speed / 45.0))


def make_history(run: dict[str, Any], generator: Any, shared: Any) -> list[dict[str, Any]]:
    """Return the `history.json` of a run: prompts are easy or hard in the same updates of all rows."""
    noise = RISE[run["reward"]]
    history = []
    for update in range(1, UPDATES + 1):
        luck = 0.25 * noise * shared.standard_normal() + 0.06 * noise * generator.standard_normal()
        entry = {"update": update, "reward/mean": float(level(run, update) + luck), "optim/grad_norm": 0.01}
        if run["method"] == "stepwise":
            entry["gain/mean"] = 0.01
            for step in range(STEPS):
                size = noise * np.exp(-((step - 1.2) ** 2) / 9.0) * (1.0 + 0.1 * generator.standard_normal())
                entry[f"gain/step_{step:02d}/abs_mean"] = float(abs(size))
        for phase, seconds in SECONDS.items():
            entry[f"time/{phase}_s"] = float(phase_seconds(run, phase, seconds) * np.exp(0.05 * generator.normal()))
        history.append(entry)
    return history


def phase_seconds(run: dict[str, Any], phase: str, seconds: float) -> float:
    """Return what a phase costs: estimates in proportion to their substeps, none of it where credit is terminal."""
    if run["method"] == "flow_grpo":
        return {"estimates": 0.0, "decode": seconds / 8.0, "reward": seconds / 8.0}.get(phase, seconds)
    return seconds * (run["num_substeps"] - 1) if phase == "estimates" else seconds


def make_evaluations(run: dict[str, Any], generator: Any) -> list[dict[str, Any]]:
    """Return the `evaluations.json` of a run."""
    size, evaluations = RISE[run["reward"]], []
    for update in range(0, UPDATES + 1, EVERY):
        progress = float(level(run, update) - BASE[run["reward"]]) / size
        jitter = 0.03 * size * generator.standard_normal() * (update > 0)
        entry: dict[str, Any] = {
            "update": update,
            f"evaluation_noisy/{run['reward']}": BASE[run["reward"]] + size * progress + jitter,
            f"evaluation/{run['reward']}": BASE[run["reward"]] + size * (0.2 + 0.9 * progress) + jitter,
            "evaluation/likeness": 0.48 + 0.05 * progress + 0.004 * generator.standard_normal() * (update > 0),
        }
        luck = 0.012 * generator.standard_normal(len(TAGS)) * (update > 0)
        shares = [share + 0.13 * progress * (1.0 - share) + d for share, d in zip(TASKS, luck, strict=True)]
        for tag, share in zip(TAGS, shares, strict=True):
            entry |= {f"geneval/{tag}": float(share), f"geneval/{tag}_stderr": 0.05}
        entry |= {"geneval/overall": float(np.mean(shares)), "geneval/overall_stderr": 0.03}
        evaluations.append(entry)
    return evaluations


def make_samples(run: dict[str, Any], generator: Any) -> dict[str, Any]:
    """Return the `samples.npz` of a run: a disc of a colour, in the right place more often after training."""
    texts = [f"a photo of {thing}" for thing in THINGS]
    places = np.random.default_rng(5).uniform(8, 24, (len(texts) * 4, 2))
    height, width = np.mgrid[0:32, 0:32]
    near = (height[None] - places[:, :1, None]) ** 2 + (width[None] - places[:, 1:, None]) ** 2
    pictures = {}
    for name, sharpness in (("before", 40.0), ("after", 8.0)):
        share = 1.0 / (1.0 + np.exp((near - 45.0) / sharpness))
        hue = np.array([[214, 60, 50], [60, 110, 200], [70, 160, 90]])[np.arange(len(places)) // 4 % 3]
        picture = share[..., None] * hue[:, None, None] + (1.0 - share[..., None]) * 225.0
        pictures[name] = (picture + 6.0 * generator.standard_normal(picture.shape)).clip(0, 255).astype(np.uint8)
    verdicts = generator.random((2, len(texts), 4)) < np.array([0.35, 0.6])[:, None, None]
    return {"texts": np.array(texts), **pictures, "correct_before": verdicts[0], "correct_after": verdicts[1]}


THINGS = (
    "a circle",
    "a star",
    "a circle and a square",
    "a star and a ring",
    "two circles",
    "three squares",
    "a red circle",
    "a blue star",
    "a circle left of a square",
    "a star above a triangle",
    "a red circle and a blue square",
    "a green star and a purple triangle",
)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
