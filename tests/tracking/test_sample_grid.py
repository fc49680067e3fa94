"""Sample grids: the right picture in the right cell, in a frame only where it is correct."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.tracking.sample_grid import CELL, GUTTER, HEADER_HEIGHT, LABEL_WIDTH, pick_rows, sample_grid

FRAME = (0, 170, 60)
SPACES = all_prompts()
PROMPTS = [SPACES["position"][0], SPACES["single_object"][0], SPACES["position"][1], SPACES["position"][2]]


def test_rows_are_the_first_of_every_task_in_geneval_order():
    assert pick_rows(PROMPTS, per_tag=2) == [1, 0, 2]
    assert pick_rows(PROMPTS, per_tag=9) == [1, 0, 2, 3]
    assert pick_rows([], per_tag=2) == []


def grid() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw two models' images of rows 2 and 0; image i shown of model m is all grey of level 10 i + 100 m."""
    images = {
        name: np.stack([np.full((32, 32, 3), 10 * i + 100 * m, dtype=np.uint8) for i in range(4)])
        for m, name in enumerate(("before", "after"))
    }
    correct = {"before": np.zeros((4, 2), dtype=bool), "after": np.ones((4, 2), dtype=bool)}
    correct["after"][2, 1] = False
    canvas = sample_grid(PROMPTS, images, correct, rows=[2, 0])
    assert isinstance(canvas, Image.Image)
    return np.asarray(canvas), images, correct


def cell(pixels: np.ndarray, model: int, line: int, index: int) -> np.ndarray:
    left = LABEL_WIDTH + model * (2 * (CELL + GUTTER) + 4 * GUTTER) + index * (CELL + GUTTER)
    top = HEADER_HEIGHT + line * (CELL + GUTTER)
    return pixels[top : top + CELL, left : left + CELL]


def test_every_image_is_in_the_cell_of_its_prompt_and_model():
    pixels, images, _ = grid()
    for model, name in enumerate(images):
        for line in range(2):
            for index in range(2):
                middle = cell(pixels, model, line, index)[CELL // 2, CELL // 2]
                assert middle.tolist() == images[name][line * 2 + index][0, 0].tolist()


def test_only_correct_images_have_a_frame():
    pixels, _, correct = grid()
    for model, name in enumerate(correct):
        for line, row in enumerate((2, 0)):
            for index in range(2):
                found = cell(pixels, model, line, index)
                is_framed = {tuple(found[y, x].tolist()) for y in (0, -1) for x in (0, -1)} == {FRAME}
                assert is_framed == correct[name][row, index]


def test_labels_are_written_beside_and_above():
    pixels, _, _ = grid()
    assert (pixels[HEADER_HEIGHT : HEADER_HEIGHT + CELL, :LABEL_WIDTH] < 128).any()
    assert (pixels[:HEADER_HEIGHT, LABEL_WIDTH:] < 128).any()
