"""Sampled shapes images whose objects people named by eye: `python -m benchmarks.labels` draws their sheets.

`data/shapes_labels` holds all images as tiles of one PNG, in rows from left to right, and one line of JSON for each.
`python -m benchmarks.labels pack IMAGES.npz LABELS.jsonl` writes both from an array `images` and the lines of a reader.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.sheets import Cell, SheetStyle, save_sheets
from benchmarks.tiles import read_tiles, write_tiles
from sfgrpo.config.loading import as_config_error
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.entry_point import run_guarded
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.lines import read_lines
from sfgrpo.shapes.world import CLASSES, COLORS, IMAGE_SIZE

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data/shapes_labels"
IMAGES, LABELS = "images.png", "labels.jsonl"
SHEETS = ROOT / "docs/images/labels"
SMEAR, DOUBTFUL = "smear", "doubtful"
"""What a thing is called that a person sees and would not name, and one that readers do not agree on."""
BASE = "base"
STYLE = SheetStyle(columns=5, text="beside", text_size=100)
PER_SHEET = 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LabelledObject:
    """One thing that a person saw in an image."""

    x: float
    y: float
    """Centre in pixels from the left and from the top."""
    colors: Sequence[str]
    """What it may be called, most often one."""
    classes: Sequence[str]
    """What it may be called; nothing for a smear."""
    sure: bool
    """Whether that is beyond doubt: one class, or none. Otherwise it may also be any of several classes or, where one
    is given, a smear."""

    @property
    def kind(self) -> str:
        """Return the class of an object beyond doubt, `smear` or `doubtful`."""
        return (self.classes[0] if self.classes else SMEAR) if self.sure else DOUBTFUL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImage:
    """A sampled image with all that a person saw in it."""

    index: int
    model: str
    """What sampled it: `base`, or what an adapter was trained on."""
    prompt: str
    """Unknown to the person."""
    objects: Sequence[LabelledObject]
    image: NDArray[np.uint8]
    """[32, 32, 3]."""


def load_labels(folder: Path = FOLDER) -> list[LabelledImage]:
    """Read all images with their labels.

    Raises:
        ConfigError: a file is absent, a line is no label (the message starts with path and line number), or there is
            not one label for every index from 0 on and one tile for every label.
    """
    restore = "restore it by `git checkout data/shapes_labels`"
    records = []
    for number, line in read_lines(folder / LABELS, restore):
        with as_config_error(f"{folder / LABELS}:{number}"):
            records.append(_parse_line(line))
    if found := next((place for place, record in enumerate(records) if record["index"] != place), None):
        raise ConfigError(
            f"{folder / LABELS}: index {records[found]['index']} stands where {found} should; write one line for every "
            "image, in order"
        )
    tiles = read_tiles(folder / IMAGES, len(records), restore)
    return [LabelledImage(image=tile, **record) for tile, record in zip(tiles, records, strict=True)]


def pack_labels(folder: Path, images: NDArray[np.uint8], lines: Sequence[str]) -> None:
    """Write images [N, 32, 32, 3] and their N labels, in the order of their index.

    Raises:
        ValueError: a line is no label, the images have another shape, or there is not one label for every image.
    """
    records = sorted((_parse_line(line)["index"], line.strip()) for line in lines)
    if (found := [index for index, _ in records]) != list(range(len(images))):
        wrong = sorted(set(range(len(images))) ^ set(found)) or [i for i in found if found.count(i) > 1]
        raise ValueError(f"{len(images)} images and {len(found)} labels, see index {wrong[0]}; write one line for each")
    write_tiles(folder / IMAGES, images)
    atomic_write(folder / LABELS, "".join(f"{line}\n" for _, line in records))


def draw_sheets(labelled: Sequence[LabelledImage], folder: Path = SHEETS) -> list[Path]:
    """Draw every image enlarged, its objects numbered and named beside it; return the files."""
    return save_sheets([_cell(each) for each in labelled], STYLE, PER_SHEET, folder, "labels")


def _cell(labelled: LabelledImage) -> Cell:
    numbered = list(enumerate(labelled.objects, start=1))
    return Cell(
        image=labelled.image,
        title=f"{labelled.index} {labelled.model.split()[0]}",
        lines=[_words(number, each) for number, each in numbered] or ["nothing"],
        marks=[(each.x, each.y, str(number)) for number, each in numbered],
    )


def _words(number: int, each: LabelledObject) -> str:
    name = "/".join(each.classes) or SMEAR
    return f"{number} {'/'.join(each.colors)} {name}{'' if each.sure else '?'}"


def _parse_line(line: str) -> dict[str, Any]:
    """Read one label; raise `ValueError` for anything else."""
    record = json.loads(line)
    _require_keys(record, ("index", "model", "prompt", "objects"), "a label")
    if type(record["index"]) is not int or record["index"] < 0:
        raise ValueError(f"index: {record['index']!r} is no whole number from 0")
    for key in ("model", "prompt"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"{key}: {record[key]!r} is no text")
    if not isinstance(record["objects"], list):
        raise ValueError(f"objects: {record['objects']!r} is no list; an image that shows nothing has []")
    return {**record, "objects": [_parse_object(item) for item in record["objects"]]}


def _parse_object(item: Any) -> LabelledObject:
    _require_keys(item, ("x", "y", "colors", "classes", "sure"), "an object")
    for key in ("x", "y"):
        if isinstance(item[key], bool) or not isinstance(item[key], int | float) or not 0 <= item[key] <= IMAGE_SIZE:
            raise ValueError(f"{key}: {item[key]!r} is no place in the image; give pixels from 0 to {IMAGE_SIZE}")
    for key, known in (("colors", COLORS), ("classes", CLASSES)):
        if not isinstance(item[key], list):
            raise ValueError(f"{key}: {item[key]!r} is no list")
        if unknown := [name for name in item[key] if name not in known]:
            raise ValueError(f"{key}: {unknown[0]!r} is unknown; allowed are {', '.join(known)}")
    if not item["colors"]:
        raise ValueError("colors: is empty; whatever is visible has a colour")
    if type(item["sure"]) is not bool or (item["sure"] and len(item["classes"]) > 1):
        raise ValueError(
            f"sure: {item['sure']!r} with {len(item['classes'])} classes; write false, or one class at most"
        )
    return LabelledObject(
        x=float(item["x"]), y=float(item["y"]), colors=item["colors"], classes=item["classes"], sure=item["sure"]
    )


def _require_keys(item: Any, keys: Sequence[str], what: str) -> None:
    if not isinstance(item, dict) or set(item) != set(keys):
        raise ValueError(f"{json.dumps(item)[:80]} is not {what}; write an object with {', '.join(keys)}")


def _pack(images: Path, labels: Path) -> None:
    lines = [line for _, line in read_lines(labels)]
    with as_config_error(str(images)), np.load(images, allow_pickle=False) as archive:
        pack_labels(FOLDER, archive["images"], lines)
    print(f"{len(lines)} images with labels in {FOLDER}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack a data set, or draw the sheets of the one that is there; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labels", description=str(__doc__).split("\n\n")[0])
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("draw", help=f"draw the sheets of {FOLDER.relative_to(ROOT)}; what is done without an action")
    pack = actions.add_parser("pack", help=f"write {FOLDER.relative_to(ROOT)}, then draw the sheets")
    pack.add_argument("images", type=Path, metavar="IMAGES.npz", help="array `images` [N, 32, 32, 3]")
    pack.add_argument("labels", type=Path, metavar="LABELS.jsonl", help="a line for each image")
    chosen: Any = parser.parse_args(arguments)

    def run() -> None:
        if chosen.action == "pack":
            _pack(chosen.images, chosen.labels)
        files = draw_sheets(load_labels())
        print(
            "".join(f"![Labels, sheet {number}](images/labels/{file.name})\n" for number, file in enumerate(files, 1))
        )

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
