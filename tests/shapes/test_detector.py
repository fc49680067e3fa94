"""The shapes detector: near perfect on rendered pictures, unimpressed by anything else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from benchmarks.detector_agreement import agreement, match_all
from benchmarks.labels import load_labels
from sfgrpo.geneval.scorer import COUNTING_THRESHOLD, is_correct
from sfgrpo.shapes.detector import COUNTED_PROBABILITY, PRESENT_PROBABILITY, detect, detect_images, score_of
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import CLASSES, COLORS, Shape, render, sample_scene
from sfgrpo.types import TAGS
from tests.support.reproductions import is_strict


def pictures(tag: str, num_images: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    space = all_prompts()[tag]
    prompts = [space[index] for index in generator.integers(len(space), size=num_images)]
    return prompts, np.stack([render(sample_scene(prompt, generator), generator) for prompt in prompts])


@pytest.mark.parametrize("tag", TAGS)
def test_rendered_pictures_pass_both_verdicts(tag):
    prompts, images = pictures(tag, 200)
    found = detect_images(images)
    assert np.mean([is_correct(*pair) for pair in zip(prompts, found, strict=True)]) >= 0.97
    assert np.mean([is_strict(*pair) for pair in zip(prompts, found, strict=True)]) >= 0.97


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_is_read_in_every_color(class_name, color):
    shape = Shape(class_name=class_name, color=color, center=(14.3, 17.8), radius=7.0)
    (detection,) = detect(render((shape,), np.random.default_rng(0)))
    assert (detection.class_name, detection.color) == (class_name, color)
    assert detection.score > 0.95
    left, top, right, bottom = detection.box
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(shape.center, abs=1.0)
    assert right - left == pytest.approx(14.0, abs=2.0)


def test_detections_come_most_confident_first_with_scores_in_the_unit_interval():
    _, images = pictures("counting", 50)
    for found in detect_images(np.stack([cv2.GaussianBlur(image, (0, 0), 1.2) for image in images])):
        scores = [detection.score for detection in found]
        assert scores == sorted(scores, reverse=True)
        assert all(0.0 <= score <= 1.0 for score in scores)


def test_score_falls_as_a_shape_dissolves():
    shape = Shape(class_name="heart", color="green", center=(16.0, 16.0), radius=8.0)
    image = render((shape,), np.random.default_rng(0))
    blurred = [image, *(cv2.GaussianBlur(image, (0, 0), sigma) for sigma in (2.0, 3.0, 4.0))]
    scores = [
        max((found.score for found in detect(each) if found.class_name == "heart"), default=0.0) for each in blurred
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.95 > 0.3 > scores[-1]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_image_holds_nothing(level):
    assert detect(np.full((32, 32, 3), level, dtype=np.uint8)) == []


def test_noise_holds_nothing_to_speak_of():
    noise = np.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    assert all(detection.score < 0.3 for found in detect_images(noise) for detection in found)


def test_specks_are_ignored():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    image[10:12, 10:13] = (215, 35, 35)
    assert detect(image) == []


def test_a_component_of_two_opposite_colors_does_no_harm():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    image[8:24, 8:24:2], image[8:24, 9:24:2] = 18, 245
    assert all(0.0 <= detection.score <= 1.0 for detection in detect(image))


@pytest.mark.parametrize("num_images", [0, 1, 64, 65])
def test_a_batch_gives_what_its_images_give_alone(num_images):
    _, images = pictures("counting", 65)
    assert detect_images(images[:num_images]) == [detect(image) for image in images[:num_images]]


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 64, 64, 3), (1, 32, 32, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"the shapes detector reads \[N, 32, 32, 3\]"):
        detect_images(np.zeros(shape, dtype=np.uint8))


# Shares over the labels that the coefficients were fitted to; `benchmarks.fit_detector` estimates unseen ones.
def test_objects_that_people_name_are_counted_whatever_their_quality_and_smears_are_not():
    labelled = load_labels()
    found = detect_images(np.stack([each.image for each in labelled]))
    shares = agreement(match_all(labelled, found, COUNTING_THRESHOLD))
    assert shares["counted"] >= 0.97
    assert shares["class_agrees"] >= 0.95
    assert shares["color_agrees"] >= 0.95
    assert shares["smears_counted"] <= 0.3


def test_poor_object_too_many_is_counted():
    """The detector before scored a notched triangle below 0.9, and policies learned to draw one too many."""
    places = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]
    shapes = tuple(Shape(class_name="triangle", color="orange", center=place, radius=4.8) for place in places)
    image = render(shapes, np.random.default_rng(0))
    image[25:29, 25:27] = image[0, 0]
    image[20:32, 20:32] = cv2.GaussianBlur(image, (0, 0), 0.8)[20:32, 20:32]
    assert [each.class_name for each in detect(image) if each.score > COUNTING_THRESHOLD] == ["triangle"] * 4


@pytest.mark.parametrize("gap", [-0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("class_name", CLASSES)
def test_touching_objects_are_told_apart(class_name, gap):
    first, second = (
        Shape(class_name=class_name, color="blue", center=(16.0 + side * (5.0 + gap / 2), 16.0), radius=5.0)
        for side in (-1, 1)
    )
    found = detect(render((first, second), np.random.default_rng(0)))
    assert [each.class_name for each in found if each.score > COUNTING_THRESHOLD] == [class_name] * 2


def test_touching_objects_of_two_colors_are_told_apart():
    square = Shape(class_name="square", color="yellow", center=(9.0, 10.0), radius=5.5)
    circle = Shape(class_name="circle", color="red", center=(19.0, 10.0), radius=5.5)
    found = detect(render((square, circle), np.random.default_rng(0)))
    counted = {(each.class_name, each.color) for each in found if each.score > COUNTING_THRESHOLD}
    assert counted == {("square", "yellow"), ("circle", "red")}


def test_score_is_genevals_at_both_probabilities_and_rises_between():
    probabilities = np.array([0.0, PRESENT_PROBABILITY, 0.4, COUNTED_PROBABILITY, 1.0])
    scores = score_of(probabilities)
    assert scores[[1, 3]] == pytest.approx([0.3, 0.9])
    assert (np.diff(scores) > 0.0).all() and scores[0] < 1e-6 and scores[-1] > 1.0 - 1e-6
