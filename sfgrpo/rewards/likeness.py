"""A held-out reward of the shapes world: how well the silhouettes that a prompt asks for explain the image.

Training never sees it. It shares nothing with the detector and the scorer but the drawing of a silhouette: no
components, thresholds, classification or boxes. A policy that learns to please the detector without drawing better
shapes gains in that reward and not in this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.rewards.base import Reward, Vocabulary
from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE, PALETTE, coverage
from sfgrpo.types import Prompt

RADII = (4.2, 4.7, 5.2, 5.8, 6.4, 7.1, 7.8, 8.6, 9.4, 10.2)
"""Pixels; the template radii, about a tenth apart."""
MARGIN = 2
"""Pixels of ground around a silhouette that belong to its template."""
FLATNESS = 0.5
"""Contrast, as a share of a clean object's, below which a weaker object matches less well."""
COLOR_TOLERANCE = 40.0
"""RGB distance from the line between ground and colour at which a pixel's weight falls to exp(-1/2)."""
VISIBLE = 60.0
"""RGB distance from the ground from which on a pixel is certainly not ground."""
MATCH_FLOOR, MATCH_CEILING = 0.60, 0.95
"""Correlation worth nothing, and correlation worth everything."""

_FRAME = 54
"""Side of the periodic frame in which templates slide: that of an image plus the extent of the largest template."""


class LikenessReward(Reward):
    """Mean match of the prompt's objects with silhouettes slid over the image, less the share left unexplained.

    For every object that the include clauses ask for (class, count, colour; relations are not looked at) the best
    normalised cross-correlation over all radii and places is taken, in turn, and its silhouette counts as explained.
    Correlations use a matte of the clause's colour, or of any palette colour if it names none.
    """

    name = "likeness"

    def check_prompt(self, prompt: Prompt) -> None:
        Vocabulary(classes=CLASSES, colors=COLORS).check_prompt(self.name, prompt)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([likeness(*pair) for pair in zip(images, prompts, strict=True)], dtype=torch.float32)


def likeness(image: NDArray[np.uint8], prompt: Prompt) -> float:
    """Score one image [32, 32, 3] in 0..1: clamp(mean match - unexplained share); 0 for an empty ground."""
    pixels = image.astype(np.float32)
    ground = np.median(pixels, axis=(0, 1))
    moved = pixels - ground
    visible = np.clip(np.sqrt((moved**2).sum(axis=-1)) / VISIBLE, 0.0, 1.0)
    mattes = {color: color_matte(moved, ground, color) for color in {clause.color for clause in prompt.include}}
    free, explained = np.ones_like(visible), np.zeros_like(visible)
    matches: list[float] = []
    for clause in prompt.include:
        maps = match_maps(mattes[clause.color], clause.class_name)
        for _ in range(clause.count):
            level, row, column = map(int, np.unravel_index((maps * free).argmax(), maps.shape))
            matches.append(float(maps[level, row, column] * free[row, column]))
            reach = int(RADII[level])
            free[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = 0.0
            explained = np.maximum(explained, _drawn(clause.class_name, level, row, column))
    unexplained = float((visible * (1.0 - explained)).sum() / max(visible.sum(), 1.0))
    return min(max(sum(matches) / len(matches) - unexplained, 0.0), 1.0)


def color_matte(moved: NDArray[np.float32], ground: NDArray[np.float32], color: str | None) -> NDArray[np.float32]:
    """Return how much of a palette colour every pixel holds, [H, W] in 0..1; of any colour if `color` is None.

    With m the pixel's move from the ground and d the colour's: the share m.d / d.d, clamped to 0..1, weighted by a
    Gaussian of what the share leaves of m. A soft edge between ground and colour lies on the line and keeps its share.
    """
    wanted = [color] if color is not None else list(PALETTE)
    mattes = []
    for name in wanted:
        aim = np.asarray(PALETTE[name], dtype=np.float32) - ground
        share = np.clip((moved * aim).sum(axis=-1) / max((aim**2).sum(), 1.0), 0.0, 1.0)
        rest = ((moved - share[..., None] * aim) ** 2).sum(axis=-1)
        mattes.append(share * np.exp(-rest / (2.0 * COLOR_TOLERANCE**2)))
    return np.asarray(np.max(mattes, axis=0))


def match_maps(matte: NDArray[np.float32], class_name: str) -> NDArray[np.float32]:
    """Return the match of a silhouette with a matte [H, W] at every radius and centre pixel: [radius, H, W] in 0..1.

    The match is the correlation coefficient over the silhouette and MARGIN around it. The matte's deviation has a
    floor there, so that a faint object matches less. MATCH_FLOOR..MATCH_CEILING is then stretched to 0..1.
    """
    spectra, deviations = _spectra(class_name)
    padded = torch.zeros(2, _FRAME, _FRAME)
    padded[0, :IMAGE_SIZE, :IMAGE_SIZE] = torch.from_numpy(matte)
    padded[1] = padded[0] ** 2
    frequencies = torch.fft.rfft2(padded)[[0, 0, 1], None] * spectra
    correlation, mean, square = torch.fft.irfft2(frequencies, s=(_FRAME, _FRAME))[..., :IMAGE_SIZE, :IMAGE_SIZE].numpy()
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    coefficient = correlation / np.maximum(deviation, FLATNESS * deviations[:, None, None])
    return np.asarray(np.clip((coefficient - MATCH_FLOOR) / (MATCH_CEILING - MATCH_FLOOR), 0.0, 1.0))


@functools.cache
def _spectra(class_name: str) -> tuple[Tensor, NDArray[np.float32]]:
    """Return conjugate spectra of a class's kernels, [kernel, radius, frequencies], and deviations of its silhouettes.

    The kernels turn a matte into its covariance with the standardised silhouette, its mean, and (from its square) its
    mean square, all over the silhouette's support.
    """
    drawn = _silhouettes(class_name, _FRAME)
    support = np.stack([_grown(silhouette, MARGIN) > 0.0 for silhouette in drawn]).astype(np.float32)
    share = support / support.sum(axis=(1, 2), keepdims=True)
    centered = drawn - (share * drawn).sum(axis=(1, 2), keepdims=True)
    deviations = np.sqrt((share * centered**2).sum(axis=(1, 2)))
    kernels = np.stack([share * centered / deviations[:, None, None], share, share])
    at_origin = np.roll(kernels, (-(_FRAME // 2), -(_FRAME // 2)), axis=(-2, -1))
    return torch.fft.rfft2(torch.from_numpy(at_origin)).conj().resolve_conj(), deviations


def _silhouettes(class_name: str, side: int) -> NDArray[np.float32]:
    """Draw a class at every radius, centred on the middle pixel: [radius, side, side]."""
    middle = side // 2 + 0.5
    return np.stack([coverage(class_name, (middle, middle), radius, side) for radius in RADII])


def _grown(silhouette: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    return np.asarray(cv2.dilate(silhouette, np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)))


def _drawn(class_name: str, level: int, row: int, column: int) -> NDArray[np.float32]:
    """Draw a silhouette with its soft edge, [H, W] in 0..1, centred on a pixel."""
    top, left = IMAGE_SIZE - row, IMAGE_SIZE - column
    return np.asarray(_explanations(class_name)[level, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])


@functools.cache
def _explanations(class_name: str) -> NDArray[np.float32]:
    return np.stack([_grown(silhouette, 1) for silhouette in _silhouettes(class_name, 2 * IMAGE_SIZE)])
