"""Labelled grid of sample images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sfgrpo.types import TAGS, Prompt

CELL = 96
GUTTER = 4
LABEL_WIDTH = 310
HEADER_HEIGHT = 30


def pick_rows(prompts: Sequence[Prompt], per_tag: int = 2) -> list[int]:
    """Return the positions of the first `per_tag` prompts of every task."""
    return [row for tag in TAGS for row in [i for i, prompt in enumerate(prompts) if prompt.tag == tag][:per_tag]]


def sample_grid(
    prompts: Sequence[Prompt],
    images: Mapping[str, NDArray[np.uint8]],
    correct: Mapping[str, NDArray[np.bool_]],
    rows: Sequence[int],
) -> Image.Image:
    """Draw one row per prompt and one block of columns per model; a correct image has a green frame.

    Args:
        images: for each model, those of the prompts in `rows`, [len(rows) * G, H, W, 3], grouped by prompt.
        correct: for each model, whether an image shows its prompt, [P, G].
        rows: positions of the prompts to show.
    """
    per_prompt = next(iter(correct.values())).shape[1]
    block = per_prompt * (CELL + GUTTER) + 4 * GUTTER
    size = LABEL_WIDTH + len(images) * block, HEADER_HEIGHT + len(rows) * (CELL + GUTTER) + GUTTER
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for column, name in enumerate(images):
        left = LABEL_WIDTH + column * block
        pen.text((left, 6), name, fill="black", font=ImageFont.load_default(size=16))
        for line, row in enumerate(rows):
            top = HEADER_HEIGHT + line * (CELL + GUTTER)
            if column == 0:
                pen.text((GUTTER * 2, top + CELL // 2 - 8), prompts[row].text, fill="black", font=font)
            for index in range(per_prompt):
                corner = (left + index * (CELL + GUTTER), top)
                picture = Image.fromarray(images[name][line * per_prompt + index])
                canvas.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), corner)
                if correct[name][row, index]:
                    pen.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), outline=(0, 170, 60), width=3)
    return canvas
