"""Labels made by eye: read strictly, packed without loss, drawn where they belong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import labels
from benchmarks.labels import FOLDER, SHEETS, draw_sheets, load_labels, pack_labels
from benchmarks.sheets import PICTURE, Cell, SheetStyle, contact_sheet
from sfgrpo.errors import ConfigError, ExitStatus
from tests.support.paths import ROOT

OBJECT = {"x": 9, "y": 12.5, "colors": ["red"], "classes": ["circle"], "sure": True}
SMEAR = OBJECT | {"classes": []}
DOUBTFUL = OBJECT | {"classes": ["circle", "heart"], "sure": False}


def label(index: int, **changes) -> dict:
    return {
        "index": index,
        "model": "base",
        "prompt": "a photo of a circle",
        "objects": [OBJECT, SMEAR, DOUBTFUL],
    } | changes


def images(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(number, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def packed(tmp_path):
    pack_labels(tmp_path, images(30), [json.dumps(label(index)) for index in reversed(range(30))])
    return tmp_path


def test_packed_images_and_labels_are_read_without_loss(packed):
    found = load_labels(packed)
    assert np.array_equal(np.stack([each.image for each in found]), images(30))
    assert [each.index for each in found] == list(range(30))
    first, second, third = found[29].objects
    assert (first.x, first.y, first.colors, first.classes) == (9.0, 12.5, ["red"], ["circle"])
    assert [each.kind for each in (first, second, third)] == ["circle", "smear", "doubtful"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (label(0, objects=[OBJECT | {"classes": ["star"]}]), "classes: 'star' is unknown; allowed are circle, "),
        (label(0, objects=[OBJECT | {"classes": None}]), "classes: None is no list"),
        (label(0, objects=[OBJECT | {"colors": ["pink"]}]), "colors: 'pink' is unknown; allowed are red"),
        (label(0, objects=[OBJECT | {"colors": []}]), "colors: is empty; whatever is visible has a colour"),
        (label(0, objects=[DOUBTFUL | {"sure": True}]), "sure: True with 2 classes; write false, or one class at most"),
        (label(0, objects=[OBJECT | {"sure": 1}]), "sure: 1 with 1 classes"),
        (label(0, objects=[OBJECT | {"x": 33}]), "x: 33 is no place in the image; give pixels from 0 to 32"),
        (label(0, objects=[OBJECT | {"y": True}]), "y: True is no place"),
        (label(0, objects=[{"x": 1, "y": 1}]), "is not an object; write an object with x, y, colors, classes, sure"),
        (label(0, objects=None), r"objects: None is no list; an image that shows nothing has \[\]"),
        (label(0, model=" "), "model: ' ' is no text"),
        (label(-1), "index: -1 is no whole number from 0"),
        (label(0) | {"note": ""}, "is not a label; write an object with index, model, prompt, objects"),
    ],
)
def test_line_that_is_no_label_is_refused_with_its_place(packed, line, message):
    (packed / "labels.jsonl").write_text(f"{json.dumps(line)}\n")
    with pytest.raises(ConfigError, match=f"labels.jsonl:1: .*{message}"):
        load_labels(packed)


def test_line_that_is_no_json_is_refused(packed):
    (packed / "labels.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match=r"labels.jsonl:1: Expecting"):
        load_labels(packed)


def test_missing_index_is_refused(packed):
    lines = (packed / "labels.jsonl").read_text().splitlines()
    (packed / "labels.jsonl").write_text("\n".join(lines[:3] + lines[4:]))
    with pytest.raises(ConfigError, match="index 4 stands where 3 should; write one line for every image, in order"):
        load_labels(packed)


def test_tiles_of_another_number_are_refused(packed):
    (packed / "labels.jsonl").write_text(json.dumps(label(0)))
    with pytest.raises(ConfigError, match="holds 48 tiles for 1 images; restore it by `git checkout"):
        load_labels(packed)


def test_absent_data_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"labels.jsonl does not exist; restore it by `git checkout"):
        load_labels(tmp_path)


@pytest.mark.parametrize(
    ("number", "indices", "message"),
    [
        (3, [0, 2], "3 images and 2 labels, see index 1"),
        (2, [0, 1, 1], "2 images and 3 labels, see index 1"),
        (1, [0, 5], "1 images and 2 labels, see index 5"),
    ],
)
def test_labels_and_images_have_to_fit(tmp_path, number, indices, message):
    with pytest.raises(ValueError, match=message):
        pack_labels(tmp_path, images(number), [json.dumps(label(index)) for index in indices])


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images are uint8 \[1, 16, 32, 3\]; give uint8 \[N, 32, 32, 3\]"):
        pack_labels(tmp_path, images(1)[:, :16], [json.dumps(label(0))])


def test_command_packs_and_draws(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "images.npz", images=images(2))
    (tmp_path / "read.jsonl").write_text("".join(f"{json.dumps(label(index))}\n" for index in range(2)))
    monkeypatch.setattr(labels, "FOLDER", tmp_path / "packed")
    monkeypatch.setattr(labels, "load_labels", lambda: load_labels(tmp_path / "packed"))
    monkeypatch.setattr(labels, "draw_sheets", lambda labelled: draw_sheets(labelled, tmp_path / "sheets"))
    monkeypatch.setattr(labels, "ROOT", tmp_path)
    arguments = ["pack", str(tmp_path / "images.npz"), str(tmp_path / "read.jsonl")]
    assert labels.main(arguments) == ExitStatus.DONE
    assert "(images/labels/labels_01.png)" in capsys.readouterr().out
    assert (tmp_path / "sheets/labels_01.png").exists()


def test_sheets_hold_all_images_and_old_ones_are_removed(packed, tmp_path):
    folder = tmp_path / "sheets"
    folder.mkdir()
    (folder / "labels_07.png").touch()
    (file,) = draw_sheets(load_labels(packed), folder)
    assert sorted(folder.iterdir()) == [file]
    with Image.open(file) as sheet:
        assert sheet.height > 6 * PICTURE


@pytest.mark.parametrize("text", ["beside", "below"])
def test_sheet_shows_image_mark_frame_and_text_where_they_belong(text):
    image = np.full((32, 32, 3), 120, dtype=np.uint8)
    plain = Cell(image=image, title="7", lines=["a line of text that is much too long for the space beside an image"])
    marked = Cell(image=image, title="7", lines=["short"], frame=(0, 150, 60), marks=[(16.0, 8.0, "1")])
    style = SheetStyle(columns=2, text=text, text_size=6 if text == "below" else 100)
    pixels = np.asarray(contact_sheet([plain, marked], style, "heading"))
    width, height = style.cell_size
    left, top = 10, 10 + 30
    first, second = (pixels[top : top + PICTURE, x : x + PICTURE] for x in (left, left + width))
    assert (first == 120).all()
    touched = np.argwhere((second != 120).any(axis=-1))
    assert np.abs(touched.mean(axis=0) - (PICTURE / 4, PICTURE / 2)).max() < 3
    assert (pixels[top - 1, left + width : left + width + PICTURE] == (0, 150, 60)).all()
    assert (pixels[:30] < 128).any()
    beside, below = pixels[top : top + height, left + PICTURE : left + width - 5], pixels[top + PICTURE + 4 :, :PICTURE]
    assert ((beside if text == "beside" else below) < 160).any()


def test_data_set_of_the_repository_is_large_and_of_several_models():
    found = load_labels()
    assert len(found) >= 300
    assert {each.model == "base" for each in found} == {True, False}
    assert len({object.kind for each in found for object in each.objects}) == 8


def test_page_shows_every_sheet_of_the_data_set():
    page = (ROOT / "docs/detector.md").read_text()
    shown = re.findall(r"\(images/labels/(labels_\d\d\.png)\)", page)
    assert shown == sorted(path.name for path in SHEETS.iterdir())
    num_sheets = -(-len(load_labels()) // labels.PER_SHEET)
    assert len(shown) == num_sheets
    size = sum(path.stat().st_size for folder in (SHEETS, FOLDER) for path in folder.iterdir())
    assert size < 2_500_000
