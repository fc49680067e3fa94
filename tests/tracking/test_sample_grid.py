"""Sample grids: prompts drawn by a seed, the right picture in the right cell, framed where correct, counted below."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sfgrpo.geneval.grammar import color_attr
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.tracking.sample_grid import (
    CAPTION_HEIGHT,
    CELL,
    FRAME,
    GREEN,
    HEADER_HEIGHT,
    LABEL_WIDTH,
    RED,
    Samples,
    layout_of,
    pick_rows,
    sample_grid,
)
from sfgrpo.types import TAGS

SPACES = all_prompts()
PROMPTS = [SPACES["position"][0], SPACES["single_object"][0], SPACES["position"][1], SPACES["counting"][0]]
ROWS = [3, 0]
MODELS = ("before", "after")


def test_rows_are_drawn_by_the_seed_in_geneval_order():
    prompts = [prompt for tag in reversed(TAGS) for prompt in SPACES[tag][:30]]
    rows = pick_rows(prompts, 2, seed=5)
    assert [prompts[row].tag for row in rows] == [tag for tag in TAGS for _ in range(2)]
    assert rows == pick_rows(prompts, 2, seed=5)
    drawn = {tuple(pick_rows(prompts, 2, seed=seed)) for seed in range(20)}
    assert len(drawn) == 20


def test_every_prompt_of_a_task_may_be_drawn():
    prompts = SPACES["single_object"]
    assert {row for seed in range(60) for row in pick_rows(prompts, 2, seed=seed)} == set(range(len(prompts)))


def test_rows_of_a_task_depend_on_its_prompts_alone():
    alone, among = SPACES["counting"], [*SPACES["single_object"], *SPACES["counting"]]
    shown = [among[row].text for row in pick_rows(among, 3, seed=1) if among[row].tag == "counting"]
    assert [alone[row].text for row in pick_rows(alone, 3, seed=1)] == shown


def test_all_prompts_of_a_small_task_are_rows():
    assert pick_rows(PROMPTS, 9, seed=0) == [1, 3, 0, 2]
    assert pick_rows([], 2, seed=0) == []


@pytest.fixture
def samples() -> dict[str, Samples]:
    """Two models' images of `ROWS`: image i of model m is all grey of level 10 i + 100 m."""
    made = {
        name: Samples(
            images=np.stack([np.full((32, 32, 3), 10 * i + 100 * m, dtype=np.uint8) for i in range(4)]),
            correct=np.full((4, 2), name == "after"),
            seen=[2, 5, None, None],
        )
        for m, name in enumerate(MODELS)
    }
    made["after"].correct[0, 1] = False
    return made


def patch(pixels: np.ndarray, samples, model: int, line: int, index: int, margin: int = 0) -> np.ndarray:
    """Return a cell with a margin around it."""
    left, top = layout_of(PROMPTS, samples, ROWS).corner(model, line, index)
    return pixels[top - margin : top + CELL + margin, left - margin : left + CELL + margin]


def cells():
    return [(model, line, index) for model in range(2) for line in range(2) for index in range(2)]


def test_every_image_is_in_the_cell_of_its_prompt_and_model(samples):
    pixels = np.asarray(sample_grid(PROMPTS, samples, ROWS))
    for model, line, index in cells():
        expected = samples[MODELS[model]].images[line * 2 + index][0, 0]
        assert (patch(pixels, samples, model, line, index) == expected).all()


def test_only_correct_images_have_a_frame_which_hides_no_pixel(samples):
    pixels = np.asarray(sample_grid(PROMPTS, samples, ROWS))
    for model, line, index in cells():
        around = patch(pixels, samples, model, line, index, margin=FRAME)
        colours = {tuple(pixel) for edge in (around[0], around[-1], around[:, 0], around[:, -1]) for pixel in edge}
        expected = GREEN if samples[MODELS[model]].correct[ROWS[line], index] else (255, 255, 255)
        assert colours == {expected}


def caption(pixels: np.ndarray, samples, model: int, line: int, index: int) -> np.ndarray:
    left, top = layout_of(PROMPTS, samples, ROWS).corner(model, line, index)
    return pixels[top + CELL + FRAME : top + CELL + FRAME + CAPTION_HEIGHT, left : left + CELL]


def has_ink(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all(axis=-1).any())


def test_number_seen_stands_below_the_images_of_a_counting_prompt(samples):
    pixels = np.asarray(sample_grid(PROMPTS, samples, ROWS))
    # Two circles are asked for.
    assert has_ink(caption(pixels, samples, 0, 0, 0), GREEN) and not has_ink(caption(pixels, samples, 0, 0, 0), RED)
    assert has_ink(caption(pixels, samples, 1, 0, 1), RED) and not has_ink(caption(pixels, samples, 1, 0, 1), GREEN)


def test_captions_of_other_numbers_differ(samples):
    others = {name: dataclasses.replace(each, seen=[3, 5, None, None]) for name, each in samples.items()}
    two, three = (np.asarray(sample_grid(PROMPTS, each, ROWS)) for each in (samples, others))
    assert not np.array_equal(caption(two, samples, 0, 0, 0), caption(three, others, 0, 0, 0))
    assert np.array_equal(caption(two, samples, 0, 0, 1), caption(three, others, 0, 0, 1))


def test_nothing_is_counted_where_no_detector_counts(samples):
    uncounted = {name: dataclasses.replace(each, seen=[None] * 4) for name, each in samples.items()}
    counted, plain = sample_grid(PROMPTS, samples, ROWS), sample_grid(PROMPTS, uncounted, ROWS)
    assert plain.height == counted.height - CAPTION_HEIGHT
    assert not has_ink(np.asarray(plain)[HEADER_HEIGHT:, LABEL_WIDTH:], RED)


def test_long_prompt_is_wrapped_and_stays_beside_its_cells(samples):
    long = color_attr("computer keyboard", "stop sign", "yellow", "orange")
    pixels = np.asarray(sample_grid([*PROMPTS[:3], long], samples, ROWS))
    labels = pixels[HEADER_HEIGHT : HEADER_HEIGHT + CELL, : LABEL_WIDTH - FRAME]
    assert (labels < 128).any()
    assert (labels[:, -2 * FRAME :] == 255).all()


def test_names_and_legend_are_written_above(samples):
    pixels = np.asarray(sample_grid(PROMPTS, samples, ROWS))
    assert (pixels[: HEADER_HEIGHT - FRAME, LABEL_WIDTH:] < 128).any()
    assert (pixels[:HEADER_HEIGHT, :LABEL_WIDTH] < 160).any()
