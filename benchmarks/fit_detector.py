"""Fit the shapes detector to the labels made by eye: `python -m benchmarks.fit_detector` writes its coefficients.

The labelled images are cross-validated first, in folds of whole images: what a detector that never saw an image counts
in it is the estimate for images to come.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.detector import autoencoded
from benchmarks.detector_agreement import MAX_DISTANCE, centre_distance
from benchmarks.labels import DOUBTFUL, SMEAR, LabelledObject, load_labels
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.files import atomic_write
from sfgrpo.shapes.detector import COEFFICIENTS, COUNTED_PROBABILITY, boxes_of, features, matched_regions
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import CLASSES, Shape, render, sample_scene

SCENES_PER_TASK = 60
NUM_NOISE = 120
RENDERED_WEIGHT = 0.1
"""Weight of a region of a rendered scene or of noise, where nothing is in doubt; a labelled one weighs 1."""
RIDGE = 1.0
"""Weight of the squared coefficients of standardised features."""
FOLDS = 5
SEED = 5
DECIMALS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """M regions with what people say of them."""

    features: NDArray[np.float64]  # [M, feature]
    accepted: NDArray[np.float64]
    """Share of people who accept the region as an object of a class, [M, class]."""
    kinds: NDArray[np.str_]
    """A class, `smear` or `doubtful`, [M]."""
    images: NDArray[np.intp]
    """Index of the image, [M]."""
    weights: NDArray[np.float64]

    def __getitem__(self, rows: NDArray[np.bool_]) -> Examples:
        return Examples(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


def joined(*parts: Examples) -> Examples:
    """Concatenate examples."""
    names = [field.name for field in dataclasses.fields(Examples)]
    return Examples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def examples_of(images: NDArray[np.uint8], labels: Sequence[Sequence[LabelledObject]], weight: float) -> Examples:
    """Segment images [N, 32, 32, 3], and give each region the nearest label; one without is a smear."""
    regions, overlaps = matched_regions(images)
    accepted, kinds = np.zeros((len(regions), len(CLASSES))), []
    for row, (owner, box) in enumerate(zip(regions.owners, boxes_of(regions.masks), strict=True)):
        distances = [centre_distance(label, tuple(box)) for label in labels[owner]]
        if not distances or min(distances) > MAX_DISTANCE:
            kinds.append(SMEAR)
            continue
        label = labels[owner][int(np.argmin(distances))]
        # A doubtful thing of one class is that or a smear, to one half each.
        share = 0.5 if label.kind == DOUBTFUL and len(label.classes) == 1 else 1.0
        accepted[row, [CLASSES.index(name) for name in label.classes]] = share
        kinds.append(label.kind)
    return Examples(
        features=features(regions, overlaps),
        accepted=accepted,
        kinds=np.array(kinds),
        images=regions.owners.astype(np.intp),
        weights=np.full(len(regions), weight),
    )


def rendered_examples(seed: int = SEED) -> Examples:
    """Return the regions of rendered scenes of all tasks, as they are and autoencoded, and those of noise."""
    generator = np.random.default_rng(seed)
    scenes = [
        sample_scene(space[generator.integers(len(space))], generator)
        for space in all_prompts().values()
        for _ in range(SCENES_PER_TASK)
    ]
    images = np.stack([render(scene, generator) for scene in scenes])
    labels = [[_label_of(shape) for shape in scene] for scene in scenes]
    noise = generator.integers(256, size=(NUM_NOISE, *images.shape[1:]), dtype=np.uint8)
    return joined(
        *(examples_of(each, labels, RENDERED_WEIGHT) for each in (images, autoencoded(images))),
        examples_of(noise, [[]] * NUM_NOISE, RENDERED_WEIGHT),
    )


def fit(examples: Examples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit one logistic regression for every class; return weights [feature, class] and bias [class]."""
    mean, deviation = examples.features.mean(axis=0), examples.features.std(axis=0)
    inputs = torch.from_numpy((examples.features - mean) / deviation)
    targets, weights = torch.from_numpy(examples.accepted), torch.from_numpy(examples.weights)[:, None]
    slope = torch.zeros(inputs.shape[1], len(CLASSES), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(CLASSES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(inputs @ slope + bias, targets, weights, reduction="sum")
        value = value + RIDGE * slope.square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch does not annotate it
    unscaled = slope.detach().numpy() / deviation[:, None]
    return unscaled, bias.detach().numpy() - mean @ unscaled


def cross_validate(labelled: Examples, rendered: Examples) -> str:
    """Return in words what detectors count that have not seen the images."""
    fold = np.random.default_rng(0).permutation(labelled.images.max() + 1)[labelled.images] % FOLDS
    probability = np.empty_like(labelled.accepted)
    for held_out in range(FOLDS):
        weights, bias = fit(joined(labelled[fold != held_out], rendered))
        probability[fold == held_out] = 1.0 / (1.0 + np.exp(-(labelled.features[fold == held_out] @ weights + bias)))
    counted = probability.max(axis=1) > COUNTED_PROBABILITY
    right = np.array(CLASSES)[probability.argmax(axis=1)] == labelled.kinds
    smear, doubtful = labelled.kinds == SMEAR, labelled.kinds == DOUBTFUL
    named = ~smear & ~doubtful
    return (
        f"{FOLDS} folds: counted are {counted[named].mean():.3f} of {named.sum()} regions with a name, "
        f"{counted[smear].mean():.3f} of {smear.sum()} smears and {counted[doubtful].mean():.3f} of {doubtful.sum()} "
        f"doubtful ones; the class is right for {right[named & counted].mean():.3f} of the counted ones with a name"
    )


def _label_of(shape: Shape) -> LabelledObject:
    x, y = shape.center
    return LabelledObject(x=x, y=y, colors=[shape.color], classes=[shape.class_name], sure=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Cross-validate, fit, and write the coefficients; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.fit_detector", description=str(__doc__).split("\n\n")[0]
    ).parse_args(arguments)
    set_up_logging()

    def run() -> None:
        images = load_labels()
        labelled = examples_of(np.stack([each.image for each in images]), [each.objects for each in images], 1.0)
        rendered = rendered_examples()
        print(cross_validate(labelled, rendered))
        weights, bias = (np.round(values, DECIMALS) for values in fit(joined(labelled, rendered)))
        atomic_write(COEFFICIENTS, json.dumps({"weights": weights.tolist(), "bias": bias.tolist()}) + "\n")
        print(f"coefficients of {len(weights)} features written to {COEFFICIENTS}")

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
