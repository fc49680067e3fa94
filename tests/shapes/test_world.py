"""The shapes world: scenes show what they are asked for, and a seed draws the same pixels for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sfgrpo.geneval.relations import relations_between
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import CLASSES, GAP, IMAGE_SIZE, PALETTE, Shape, coverage, render, sample_scene
from sfgrpo.types import TAGS

UNIFORM = dict.fromkeys(TAGS, 1.0)


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_show_exactly_what_the_prompt_asks_for(tag):
    generator = np.random.default_rng(0)
    space = all_prompts()[tag]
    for prompt in (space[index] for index in generator.integers(len(space), size=50)):
        scene = sample_scene(prompt, generator)
        wanted = [clause for clause in prompt.include for _ in range(clause.count)]
        assert [shape.class_name for shape in scene] == [clause.class_name for clause in wanted]
        assert all(clause.color in (None, shape.color) for clause, shape in zip(wanted, scene, strict=True))


@pytest.mark.parametrize("tag", TAGS)
def test_shapes_keep_their_distance_from_each_other_and_the_border(tag):
    generator = np.random.default_rng(1)
    space = all_prompts()[tag]
    for prompt in (space[index] for index in generator.integers(len(space), size=50)):
        scene = sample_scene(prompt, generator)
        for index, shape in enumerate(scene):
            assert all(shape.radius + GAP <= c <= IMAGE_SIZE - shape.radius - GAP for c in shape.center)
            for other in scene[:index]:
                distance = max(abs(a - b) for a, b in zip(shape.center, other.center, strict=True))
                assert distance > shape.radius + other.radius + GAP


def test_position_scenes_stand_in_their_relation():
    generator = np.random.default_rng(2)
    for prompt in all_prompts()["position"]:
        target, own = (
            (x - radius, y - radius, x + radius, y + radius)
            for (x, y), radius in ((shape.center, shape.radius) for shape in sample_scene(prompt, generator))
        )
        assert prompt.include[1].position[0] in relations_between(own, target)


def test_what_a_prompt_leaves_open_varies():
    generator = np.random.default_rng(3)
    scenes = [sample_scene(all_prompts()["single_object"][0], generator)[0] for _ in range(50)]
    assert len({shape.color for shape in scenes}) > 4
    assert len({shape.center for shape in scenes}) == 50


@pytest.mark.parametrize("class_name", CLASSES)
def test_coverage_grows_with_the_square_of_the_radius(class_name):
    small, large = (coverage(class_name, (16.0, 16.0), radius).sum() for radius in (5.0, 10.0))
    assert large / small == pytest.approx(4.0, rel=0.04)


def test_coverage_of_a_circle_is_its_area():
    assert coverage("circle", (16.0, 16.0), 8.0).sum() == pytest.approx(np.pi * 64, rel=0.02)


def test_render_paints_the_named_color_on_grey():
    shape = Shape(class_name="square", color="red", center=(16.0, 16.0), radius=8.0)
    image = render((shape,), np.random.default_rng(0))
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[16, 16], PALETTE["red"], atol=9)
    assert np.ptp(image[0, 0]) == 0


def test_a_seed_draws_the_same_pictures_for_ever():
    """The base model was trained on these very pixels: a new digest means a new world and a new base model."""
    pictures = render_pictures(64, UNIFORM, seed=0)
    digest = hashlib.sha256(pictures.images.tobytes() + pictures.prompt_index.tobytes()).hexdigest()
    assert digest == "ae0f7483e0469441e1a6ba2219f8f4437404ad8200e8bf4777cfe509db61a03a"


def test_pictures_show_their_prompts_in_the_ratio_of_the_weights():
    pictures = render_pictures(300, UNIFORM | {"position": 0.0, "color_attr": 5.0}, seed=1)
    tags = [pictures.prompts[index].tag for index in pictures.prompt_index]
    assert "position" not in tags
    assert tags.count("color_attr") / len(tags) == pytest.approx(5 / 9, abs=0.1)
