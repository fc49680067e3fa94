"""The benchmark of the detector: matches by distance, and numbers that follow from made-up detections."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import detector
from benchmarks.detector_agreement import agreement, confusion, match, match_all
from benchmarks.labels import LabelledImage, LabelledObject, pack_labels
from sfgrpo.errors import ExitStatus
from sfgrpo.shapes.detector import detect_images
from sfgrpo.types import TAGS, Detection


def label(x: float, y: float, class_name: str | None = "circle", color: str = "red") -> LabelledObject:
    return LabelledObject(x=x, y=y, colors=[color], classes=[class_name] if class_name else [], sure=True)


def found(x: float, y: float, class_name: str = "circle", color: str = "red", score: float = 0.95) -> Detection:
    return Detection(class_name=class_name, box=(x - 3, y - 3, x + 3, y + 3), score=score, color=color)


def labelled(*objects: LabelledObject, model: str = "base") -> LabelledImage:
    blank = np.full((32, 32, 3), 128, dtype=np.uint8)
    return LabelledImage(index=0, model=model, prompt="a photo of a circle", objects=objects, image=blank)


def test_closest_pairs_are_matched_first_and_each_is_used_once():
    labels = [label(10, 10), label(13, 10)]
    detections = [found(12.5, 10), found(16, 10)]
    matched = match(labels, detections)
    # The first detection is 0.5 from the second label; the other is too far from the label that is left.
    assert matched.pairs == [(labels[1], detections[0])]
    assert matched.missed == [labels[0]] and matched.extra == [detections[1]]
    assert matched.labels == [labels[1], labels[0]] and matched.detections == detections


def test_detection_farther_than_five_pixels_is_of_nothing_seen():
    assert match([label(10, 10)], [found(15, 10)]).pairs
    assert not match([label(10, 10)], [found(15.1, 10)]).pairs


def test_more_confident_detection_wins_at_equal_distance():
    detections = [found(12, 10, "ring", score=0.9), found(12, 10, "circle", score=0.8)]
    assert match([label(10, 10)], detections).pairs[0][1].class_name == "ring"


def test_threshold_is_compared_as_geneval_does():
    image = labelled(label(10, 10))
    at, above = (match_all([image], [[found(10, 10, score=score)]], 0.9)[0].pairs for score in (0.9, 0.901))
    assert not at and above


DOUBTFUL = LabelledObject(x=8, y=8, colors=["red"], classes=["circle", "heart"], sure=False)


def matches():
    return [
        match([label(8, 8), label(24, 8, "ring", "blue")], [found(8, 8), found(24, 9, "circle", "purple")]),
        match([label(8, 8, "square"), label(24, 24, None)], [found(24, 24, "heart"), found(16, 4, "cross")]),
        match([label(8, 8, None)], []),
        match([DOUBTFUL, label(24, 24, "cross")], [found(8, 8, "heart"), found(24, 24, "cross")]),
        match([DOUBTFUL], [found(8, 8, "ring")]),
    ]


def test_shares_are_of_named_objects_smears_and_doubtful_things():
    assert agreement(matches()) == {
        "objects": 4,
        "counted": 0.75,
        "counted_as_class": 0.5,
        "class_agrees": pytest.approx(2 / 3),
        "color_agrees": pytest.approx(2 / 3),
        "smears": 2,
        "smears_counted": 0.5,
        "doubtful": 2,
        "doubtful_counted": 1.0,
        "doubtful_agrees": 0.5,
        "extra": 1,
        "certain_images": 3,
        "images_agree": pytest.approx(1 / 3),
    }


def test_confusion_table_holds_everything_seen_or_detected_once():
    table = confusion(matches())
    cells = {(row, column): number for row, numbers in table.items() for column, number in numbers.items() if number}
    assert cells == {
        ("circle", "circle"): 1,
        ("ring", "circle"): 1,
        ("square", "missed"): 1,
        ("smear", "heart"): 1,
        ("smear", "missed"): 1,
        ("nothing", "cross"): 1,
        ("doubtful", "heart"): 1,
        ("doubtful", "ring"): 1,
        ("cross", "cross"): 1,
    }


def test_nothing_to_share_is_no_share():
    assert agreement([match([], [])])["counted"] is None
    assert agreement([match([], [])])["images_agree"] == 1.0


def test_models_are_measured_apart():
    images = [labelled(label(8, 8)), labelled(label(8, 8), model="trained on something")]
    measured = detector.measure_labels(images, lambda pixels: [[found(8, 8)], [found(8, 8, score=0.5)]])
    assert [measured[name]["0.9"]["counted"] for name in ("all", "base", "trained")] == [0.5, 1.0, 0.0]
    assert [measured[name]["0.3"]["counted"] for name in ("all", "base", "trained")] == [1.0, 1.0, 1.0]


def test_ceilings_are_high_for_the_detector_and_low_for_a_blind_one(monkeypatch):
    monkeypatch.setattr(detector, "autoencoded", lambda images: images // 2 + 64)
    ceilings = detector.measure_ceilings(detect_images, per_task=20)
    assert set(ceilings["rendered"]) == set(TAGS)
    assert all(share["correct"] >= 0.9 and share["whole"] >= 0.9 for share in ceilings["rendered"].values())
    blind = detector.measure_ceilings(lambda images: [[] for _ in images], per_task=5)
    assert all(share == {"correct": 0.0, "whole": 0.0} for share in blind["autoencoded"].values())


def test_extra_object_spoils_the_whole_scene_and_not_always_the_verdict(monkeypatch):
    monkeypatch.setattr(detector, "autoencoded", lambda images: images)

    def with_extra(images):
        return [[*each, found(2, 2, "ring", "white")] for each in detect_images(images)]

    single = detector.measure_ceilings(with_extra, per_task=10)["rendered"]["single_object"]
    assert single["correct"] == 1.0 and single["whole"] == 0.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_command_measures_everything(tmp_path, monkeypatch, capsys):
    images = np.full((2, 32, 32, 3), 128, dtype=np.uint8)
    images[:, 4:12, 4:12] = (215, 35, 35)
    square = {"x": 8, "y": 8, "colors": ["red"], "classes": ["square"], "sure": True}
    lines = [
        json.dumps({"index": index, "model": model, "prompt": "a photo of a square", "objects": [square]})
        for index, model in enumerate(("base", "trained on something"))
    ]
    pack_labels(tmp_path, images, lines)
    monkeypatch.setattr(detector, "SCENES_PER_TASK", 2)
    monkeypatch.setattr(detector, "measure_ceilings", lambda detect: ceilings_of_two(detect))
    arguments = ["--labels", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert detector.main(arguments) == ExitStatus.DONE
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["labels"]["all"]["0.9"]["counted_as_class"] == 1.0
    assert results["ms_per_image"] > 0.0
    text = capsys.readouterr().out
    assert "| square | 0 | 2 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| autoencoded, GenEval's verdict |" in text


MEASURE_CEILINGS = detector.measure_ceilings


def ceilings_of_two(detect):
    return MEASURE_CEILINGS(detect, per_task=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sfgrpo.shapes.nowhere:detect", "cannot be imported"),
        ("sfgrpo.shapes.detector:nothing", "cannot be imported"),
        ("sfgrpo.shapes.detector:PART_MATCH", "is no function"),
        ("", "write MODULE:FUNCTION"),
    ],
)
def test_wrong_detector_is_refused(capsys, name, message):
    assert detector.main(["--detector", name]) == ExitStatus.WRONG_CONFIGURATION
    assert message in capsys.readouterr().err
