"""The shapes counter: how many things an image shows, whatever they are and however well they are drawn."""

from __future__ import annotations

import ast
import inspect

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks.labels import load_labels
from sfgrpo.shapes import counter
from sfgrpo.shapes.counter import count_objects
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import CLASSES, COLORS, PALETTE, Shape, coverage, render, sample_scene
from sfgrpo.types import TAGS, Tag

GROUND = 128


def scenes(tag: Tag, num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rendered images of a task, and how many objects each shows."""
    generator = np.random.default_rng(seed)
    space = all_prompts()[tag]
    drawn = [sample_scene(space[index], generator) for index in generator.integers(len(space), size=num_images)]
    return np.stack([render(scene, generator) for scene in drawn]), np.array(list(map(len, drawn)))


def painted(*covers: np.ndarray, color: tuple[int, int, int] = PALETTE["blue"]) -> np.ndarray:
    """Return one image [1, 32, 32, 3] with every cover, the covered fraction of each pixel, in one colour."""
    alpha = np.max([np.zeros((32, 32)), *covers], axis=0)[..., None]
    return np.round(GROUND * (1 - alpha) + np.array(color) * alpha).astype(np.uint8)[None]


def circle(x: float, y: float, radius: float) -> np.ndarray:
    return coverage("circle", (x, y), radius)


@pytest.mark.parametrize("tag", TAGS)
def test_objects_of_rendered_scenes_are_counted(tag):
    images, numbers = scenes(tag, 200)
    assert np.mean(count_objects(images) == numbers) >= 0.99


def test_objects_of_autoencoded_scenes_are_counted(pytestconfig):
    autoencoder = AutoencoderKL.from_pretrained(pytestconfig.rootpath / "models/shapes-base", subfolder="vae")
    images, numbers = map(np.concatenate, zip(*(scenes(tag, 40, seed=1) for tag in TAGS), strict=True))
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0
        decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample
    seen = ((decoded.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.mean(count_objects(seen) == numbers) >= 0.99


def test_objects_of_sampled_images_are_counted_as_by_eye():
    labelled = load_labels()
    numbers = count_objects(np.stack([each.image for each in labelled]))
    assert np.mean(numbers == [len(each.objects) for each in labelled]) >= 0.95


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_is_one_object_at_every_size(class_name, color):
    generator = np.random.default_rng(0)
    shapes = [
        Shape(class_name=class_name, color=color, center=(16.3, 15.8), radius=radius) for radius in (4.2, 7.0, 10.0)
    ]
    assert count_objects(np.stack([render((shape,), generator) for shape in shapes])).tolist() == [1, 1, 1]


def test_bare_ground_shows_nothing():
    noise = np.random.default_rng(0).normal(GROUND, 3.0, (1, 32, 32, 3)).round().astype(np.uint8)
    assert count_objects(np.concatenate([painted(), noise])).tolist() == [0, 0]


def test_three_triangles_and_a_poor_fourth_are_four():
    triangles = [coverage("triangle", center, 4.5) for center in ((8, 8), (24, 8), (8, 24))]
    poor = coverage("triangle", (24, 24), 4.5)
    poor[24:, 24:] *= 0.15
    assert count_objects(painted(*triangles)).tolist() == [3]
    assert count_objects(painted(*triangles, cv2.GaussianBlur(poor, (0, 0), 0.8))).tolist() == [4]


def test_objects_that_touch_are_two():
    assert count_objects(painted(circle(11, 16, 4.8), circle(20, 16, 4.8))).tolist() == [2]
    bridge = np.zeros((32, 32))
    bridge[15:17, 10:22] = 0.4
    assert count_objects(painted(circle(9, 16, 4.5), circle(23, 16, 4.5), bridge)).tolist() == [2]


def test_broken_ring_is_one_object():
    ring = coverage("ring", (16, 16), 6.0)
    ring[:13, 13:19] = 0.0
    assert count_objects(painted(ring)).tolist() == [1]


def test_pale_object_counts_and_its_shadow_does_not():
    pale, shadow = ((GROUND + contrast,) * 3 for contrast in (60, 12))
    image = painted(circle(9, 9, 4.5), color=pale)
    assert count_objects(image).tolist() == [1]
    assert count_objects(np.maximum(image, painted(circle(23, 23, 4.5), color=shadow))).tolist() == [1]


def test_speck_is_no_object():
    image = painted(circle(9, 9, 4.5))
    image[0, 24, 24] = PALETTE["blue"]
    assert count_objects(image).tolist() == [1]


def test_count_of_an_image_does_not_depend_on_the_others():
    images = np.concatenate([scenes("counting", 70)[0], scenes("position", 30)[0]])
    together = count_objects(images)
    assert together.dtype == np.int64
    assert together.tolist() == [int(count_objects(image[None])[0]) for image in images]
    assert count_objects(images[:0]).shape == (0,)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"shape \[2, 64, 64, 3\]; the shapes counter reads \[N, 32, 32, 3\]"):
        count_objects(np.zeros((2, 64, 64, 3), dtype=np.uint8))


def test_counter_shares_nothing_with_the_detector():
    """Of the world it knows the size of an image; silhouettes, palette and detector are not imported."""
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(inspect.getsource(counter)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sfgrpo")
        for alias in node.names
    }
    assert imported == {"sfgrpo.shapes.world.IMAGE_SIZE"}
