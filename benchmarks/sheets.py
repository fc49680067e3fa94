"""Contact sheets: small images enlarged, each with its number and a few lines of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Place = Literal["beside", "below"]
PICTURE = 128
"""Side of an enlarged image in pixels."""
GAP, FRAME = 10, 3
LINE_HEIGHT = 15
TITLE_FONT, TEXT_FONT, MARK_FONT = (ImageFont.load_default(size=size) for size in (14, 12, 11))
BLACK, GREY, GREEN, RED = (0, 0, 0), (105, 105, 105), (0, 150, 60), (190, 40, 30)
Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One image of a sheet."""

    image: NDArray[np.uint8]
    title: str
    lines: Sequence[str]
    """Below the title; one that is too long is wrapped."""
    frame: Color | None = None
    marks: Sequence[tuple[float, float, str]] = ()
    """Texts upon the image, each with its x and y in pixels of the image."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SheetStyle:
    """How a sheet is laid out."""

    columns: int
    text: Place
    text_size: int
    """Width of the text beside an image, or lines below it, the title included."""

    @property
    def cell_size(self) -> tuple[int, int]:
        """Width and height of a cell with its gap."""
        width, height = PICTURE + GAP, PICTURE + GAP
        if self.text == "beside":
            return width + GAP + self.text_size, height
        return width, height + self.text_size * LINE_HEIGHT + FRAME

    @property
    def text_width(self) -> int:
        """Pixels that a line of text may be wide."""
        return self.text_size if self.text == "beside" else PICTURE

    def text_corner(self, left: int, top: int) -> tuple[int, int]:
        """Return where the text of the picture at a corner starts."""
        return (left + PICTURE + GAP, top) if self.text == "beside" else (left, top + PICTURE + FRAME + 2)


def contact_sheet(cells: Sequence[Cell], style: SheetStyle, heading: str = "") -> Image.Image:
    """Draw all cells in rows, from left to right; `heading` is written above them."""
    width, height = style.cell_size
    head = GAP + (2 * LINE_HEIGHT if heading else 0)
    rows = -(-len(cells) // style.columns)
    canvas = Image.new("RGB", (style.columns * width + GAP, head + rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP), heading, fill=BLACK, font=TITLE_FONT)
    for number, cell in enumerate(cells):
        row, column = divmod(number, style.columns)
        _draw_cell(canvas, pen, cell, style, (GAP + column * width, head + row * height))
    return canvas


def save_sheets(cells: Sequence[Cell], style: SheetStyle, per_sheet: int, folder: Path, name: str) -> list[Path]:
    """Write sheets of `per_sheet` cells as `<name>_<number>.png`, and remove those of an earlier, longer set."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for first in range(0, len(cells), per_sheet):
        files.append(folder / f"{name}_{first // per_sheet + 1:02d}.png")
        # Few colours: a palette makes the file a third as large, and nobody sees it.
        sheet = contact_sheet(cells[first : first + per_sheet], style)
        sheet.quantize(256, dither=Image.Dither.NONE).save(files[-1], optimize=True)
    for old in set(folder.glob(f"{name}_[0-9][0-9].png")) - set(files):
        old.unlink()
    return files


def _draw_cell(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, style: SheetStyle, corner: tuple[int, int]
) -> None:
    left, top = corner
    if cell.frame is not None:
        ends = left + PICTURE + FRAME - 1, top + PICTURE + FRAME - 1
        pen.rectangle((left - FRAME, top - FRAME, *ends), fill=cell.frame)
    picture = Image.fromarray(cell.image)
    canvas.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC), corner)
    scale = PICTURE / cell.image.shape[0]
    for x, y, text in cell.marks:
        place = left + x * scale, top + y * scale
        pen.text(place, text, fill="white", font=MARK_FONT, anchor="mm", stroke_width=2, stroke_fill="black")
    x_text, y_text = style.text_corner(left, top)
    pen.text((x_text, y_text), cell.title, fill=BLACK, font=TITLE_FONT)
    lines = [part for line in cell.lines for part in wrapped(pen, line, style.text_width)]
    for number, line in enumerate(lines, start=1):
        pen.text((x_text, y_text + number * LINE_HEIGHT + 2), line, fill=GREY, font=TEXT_FONT)


def wrapped(pen: ImageDraw.ImageDraw, text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text, none wider than `width` pixels unless a single word is."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=TEXT_FONT) > width:
            yield line
            line = word
        else:
            line = longer
    yield line
