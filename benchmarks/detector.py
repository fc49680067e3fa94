"""Compare the shapes detector with labels made by eye, time it, and find its ceilings: `python -m benchmarks.detector`.

Prints Markdown; `--json FILE` also writes the numbers. Another detector of the same signature is measured by
`--detector MODULE:FUNCTION`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.detector_agreement import MISSED, Match, agreement, confusion, match_all
from benchmarks.labels import BASE, FOLDER, LabelledImage, load_labels
from sfgrpo.errors import ConfigError
from sfgrpo.geneval.scorer import COUNTING_THRESHOLD, THRESHOLD, is_correct
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.files import write_json
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import CLASSES, Shape, render, sample_scene
from sfgrpo.types import Detection, Prompt

ROOT = Path(__file__).resolve().parents[1]
AUTOENCODER = ROOT / "models/shapes-base/vae"
DETECTOR = "sfgrpo.shapes.detector:detect_images"
SCENES_PER_TASK, SEED = 300, 0
BATCH, ROUNDS = 192, 7
"""Images of a training's rollout, and how often they are timed; the fastest round counts."""
THRESHOLDS = (COUNTING_THRESHOLD, THRESHOLD)

Detector = Callable[[NDArray[np.uint8]], list[list[Detection]]]


def measure_labels(labelled: Sequence[LabelledImage], detect: Detector) -> dict[str, Any]:
    """Compare a detector with all labels and, apart, with those of base and of trained models, at both thresholds."""
    found = detect(np.stack([each.image for each in labelled]))
    groups = {
        "all": [True] * len(labelled),
        BASE: [each.model == BASE for each in labelled],
        "trained": [each.model != BASE for each in labelled],
    }
    measured: dict[str, Any] = {}
    for name, chosen in groups.items():
        images = [each for each, is_in in zip(labelled, chosen, strict=True) if is_in]
        detections = [each for each, is_in in zip(found, chosen, strict=True) if is_in]
        if images:
            measured[name] = {"images": len(images)} | {
                f"{threshold:g}": _at(match_all(images, detections, threshold)) for threshold in THRESHOLDS
            }
    return measured


def measure_ceilings(detect: Detector, per_task: int = SCENES_PER_TASK, seed: int = SEED) -> dict[str, Any]:
    """Return for every task the share of scenes that are found right, as rendered and after the autoencoder.

    `correct` is GenEval's verdict. `whole` asks for more: what exceeds the counting threshold are the scene's objects
    with their classes and colours, and nothing else.
    """
    ceilings: dict[str, Any] = {"rendered": {}, "autoencoded": {}}
    for tag, space in all_prompts().items():
        generator = np.random.default_rng(seed)
        prompts = [space[index] for index in generator.integers(len(space), size=per_task)]
        scenes = [sample_scene(prompt, generator) for prompt in prompts]
        rendered = np.stack([render(scene, generator) for scene in scenes])
        for kind, images in (("rendered", rendered), ("autoencoded", autoencoded(rendered))):
            ceilings[kind][tag] = _ceiling(prompts, scenes, detect(images))
    return ceilings


def autoencoded(images: NDArray[np.uint8], batch_size: int = 100) -> NDArray[np.uint8]:
    """Encode images [N, 32, 32, 3] by the base model's autoencoder, without noise, and decode them again."""
    import torch
    from diffusers import AutoencoderKL

    from sfgrpo.policies.sd3 import to_images
    from sfgrpo.pretraining.autoencoder import to_pixels

    autoencoder = AutoencoderKL.from_pretrained(AUTOENCODER, use_safetensors=True)
    decoded = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            latents = autoencoder.encode(to_pixels(images[start : start + batch_size])).latent_dist.mean
            decoded.append(to_images(autoencoder.decode(latents).sample))
    return np.concatenate(decoded)


def measure_time(images: NDArray[np.uint8], detect: Detector) -> float:
    """Return the milliseconds that an image takes in a batch as large as a training's, the fastest of some rounds."""
    batch = images[np.arange(BATCH) % len(images)]
    detect(batch[:8])
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        detect(batch)
        rounds.append(time.perf_counter() - started)
    return 1000.0 * min(rounds) / BATCH


def markdown(results: Mapping[str, Any]) -> str:
    """Return all tables."""
    labels = results["labels"]
    parts = [_agreement_table(labels)]
    for threshold in THRESHOLDS:
        parts += [f"All {labels['all']['images']} images, detections above {threshold:g}:"]
        parts += [_confusion_table(labels["all"][f"{threshold:g}"]["confusion"])]
    return "\n\n".join([*parts, _ceiling_table(results["ceilings"]), f"{results['ms_per_image']:.2f} ms an image"])


def _at(matches: Sequence[Match]) -> dict[str, Any]:
    return agreement(matches) | {"confusion": confusion(matches)}


def _ceiling(
    prompts: Sequence[Prompt], scenes: Sequence[tuple[Shape, ...]], found: Sequence[Sequence[Detection]]
) -> dict[str, float]:
    correct = [is_correct(prompt, detections) for prompt, detections in zip(prompts, found, strict=True)]
    whole = [
        Counter((shape.class_name, shape.color) for shape in scene)
        == Counter((each.class_name, each.color) for each in detections if each.score > COUNTING_THRESHOLD)
        for scene, detections in zip(scenes, found, strict=True)
    ]
    return {"correct": float(np.mean(correct)), "whole": float(np.mean(whole))}


def _agreement_table(labels: Mapping[str, Any]) -> str:
    names = {
        "objects": "objects beyond doubt",
        "counted": "of these, detected",
        "counted_as_class": "of these, detected as what they are",
        "class_agrees": "class agrees, of those detected",
        "color_agrees": "colour agrees, of those detected",
        "smears": "smears",
        "smears_counted": "of these, detected",
        "doubtful": "doubtful things",
        "doubtful_counted": "of these, detected",
        "doubtful_agrees": "of those detected, as one of their possible classes",
        "extra": "detections where a person sees nothing",
        "certain_images": "images without doubtful things",
        "images_agree": "of these, with the same number of every class",
    }
    columns = [(group, f"{threshold:g}") for group in labels for threshold in THRESHOLDS]
    header = ["", *(f"{group}, above {threshold}" for group, threshold in columns)]
    rows = [header, ["---", *["---:"] * len(columns)]]
    for key, name in names.items():
        rows.append([name, *(_number(labels[group][threshold][key]) for group, threshold in columns)])
    return _table(rows)


def _confusion_table(table: Mapping[str, Mapping[str, int]]) -> str:
    columns = (*CLASSES, MISSED)
    rows = [["by eye / detected", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[label, *(str(numbers[column]) for column in columns)] for label, numbers in table.items()]
    return _table(rows)


def _ceiling_table(ceilings: Mapping[str, Any]) -> str:
    tags = list(ceilings["rendered"])
    rows = [["right scenes", *tags], ["---", *["---:"] * len(tags)]]
    for kind, of_tag in ceilings.items():
        for key, name in (("correct", "GenEval's verdict"), ("whole", "every object, and no other")):
            rows.append([f"{kind}, {name}", *(f"{of_tag[tag][key]:.3f}" for tag in tags)])
    return _table(rows)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _resolve(name: str) -> Detector:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--detector: {name[:80]!r} cannot be imported ({error}); write MODULE:FUNCTION") from error
    if not callable(found):
        raise ConfigError(f"--detector: {name[:80]!r} is no function; name one like {DETECTOR}")
    detect: Detector = found
    return detect


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a detector, print the tables and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--detector", default=DETECTOR, metavar="MODULE:FUNCTION", help="what to measure (%(default)s)")
    parser.add_argument("--labels", type=Path, default=FOLDER, metavar="FOLDER", help="data set (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    chosen: Any = parser.parse_args(arguments)
    set_up_logging()

    def run() -> None:
        detect, labelled = _resolve(chosen.detector), load_labels(chosen.labels)
        results = {
            "detector": chosen.detector,
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "opencv-python-headless")},
            "labels": measure_labels(labelled, detect),
            "ceilings": measure_ceilings(detect),
            "ms_per_image": measure_time(np.stack([each.image for each in labelled]), detect),
        }
        if chosen.json is not None:
            write_json(chosen.json, results)
        print(markdown(results))

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
