"""Labelled grid of sample images: prompts drawn by a seed, and the same prompts and noise for every model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sfgrpo.types import TAGS, Prompt

CELL = 112
FRAME = 4
"""Width of the frame around a correct image, outside its pixels."""
GAP = 3 * FRAME
BLOCK_GAP = 36
LABEL_WIDTH, HEADER_HEIGHT, CAPTION_HEIGHT = 316, 60, 20
MARGIN = 12
GREEN, RED, GREY = (0, 150, 60), (190, 40, 30), (110, 110, 110)
MODEL_FONT, PROMPT_FONT, SMALL_FONT = (ImageFont.load_default(size=size) for size in (20, 17, 14))
LEGEND = "green frame: correct by GenEval's rules"
COUNTS_LEGEND = "seen: objects that GenEval would count"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a grid shows of one model."""

    images: NDArray[np.uint8]
    """Those of the prompts that are shown, [shown * G, H, W, 3], grouped by prompt."""
    correct: NDArray[np.bool_]
    """Whether an image shows its prompt, [P, G]."""
    seen: Sequence[int | None]
    """For each of `images`, how many objects of the class that a counting prompt asks for were detected; else None."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the cells of a grid are."""

    per_prompt: int
    num_models: int
    has_caption: Sequence[bool]
    """For every line, whether its cells have a caption below."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid."""
        width, _ = self.corner(self.num_models, 0, 0)
        _, height = self.corner(0, len(self.has_caption), 0)
        return width - BLOCK_GAP + MARGIN, height - GAP + MARGIN

    def corner(self, model: int, line: int, index: int) -> tuple[int, int]:
        """Return left and top of a cell."""
        block = self.per_prompt * (CELL + GAP) - GAP + BLOCK_GAP
        top = HEADER_HEIGHT + line * (CELL + GAP) + CAPTION_HEIGHT * sum(self.has_caption[:line])
        return LABEL_WIDTH + model * block + index * (CELL + GAP), top


def pick_rows(prompts: Sequence[Prompt], per_tag: int = 2, *, seed: int) -> list[int]:
    """Draw the positions of `per_tag` prompts of every task, in GenEval's order, or of all where a task has fewer.

    The draw of a task depends on its prompts and the seed alone. The seed is that of the noise, `evaluation.seed` or,
    in a promotion, `promotion.seed`, so that everyone who has the same prompts and parameters shows the same rows.
    """
    rows: list[int] = []
    for number, tag in enumerate(TAGS):
        of_task = [position for position, prompt in enumerate(prompts) if prompt.tag == tag]
        order = np.random.default_rng([seed, number]).permutation(len(of_task))
        rows += sorted(of_task[place] for place in order[:per_tag])
    return rows


def layout_of(prompts: Sequence[Prompt], samples: Mapping[str, Samples], rows: Sequence[int]) -> Layout:
    """Lay out the grid that `sample_grid` draws; a counting prompt of which objects were counted has captions."""
    per_prompt = next(iter(samples.values())).correct.shape[1]
    counted = [
        any(count is not None for each in samples.values() for count in each.seen[line * per_prompt :][:per_prompt])
        for line in range(len(rows))
    ]
    return Layout(per_prompt=per_prompt, num_models=len(samples), has_caption=counted)


def sample_grid(prompts: Sequence[Prompt], samples: Mapping[str, Samples], rows: Sequence[int]) -> Image.Image:
    """Draw one row per prompt and one block of columns per model; a correct image has a green frame.

    Below the images of a counting prompt stands the number of objects that was asked for, and the number seen.

    Args:
        prompts: those of `Samples.correct`.
        samples: the images of every model, by its name.
        rows: positions of the prompts to show.
    """
    layout = layout_of(prompts, samples, rows)
    canvas = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(canvas)
    _draw_legend(pen, has_counts=any(layout.has_caption))
    for line, row in enumerate(rows):
        _draw_label(pen, prompts[row], layout.corner(0, line, 0)[1])
    for model, (name, shown) in enumerate(samples.items()):
        left, top = layout.corner(model, 0, 0)
        pen.text((left, top - MARGIN), name, fill="black", font=MODEL_FONT, anchor="ls")
        for line, row in enumerate(rows):
            for index in range(layout.per_prompt):
                corner, number = layout.corner(model, line, index), line * layout.per_prompt + index
                picture = Image.fromarray(shown.images[number])
                if shown.correct[row, index]:
                    _draw_frame(pen, corner)
                canvas.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), corner)
                if (seen := shown.seen[number]) is not None:
                    _draw_caption(pen, corner, prompts[row].include[0].count, seen)
    return canvas


def _draw_legend(pen: ImageDraw.ImageDraw, *, has_counts: bool) -> None:
    lines = [LEGEND, COUNTS_LEGEND] if has_counts else [LEGEND]
    for place, text in enumerate(reversed(lines)):
        pen.text((MARGIN, HEADER_HEIGHT - MARGIN - 18 * place), text, fill=GREY, font=SMALL_FONT, anchor="ls")


def _draw_label(pen: ImageDraw.ImageDraw, prompt: Prompt, top: int) -> None:
    """Write task and prompt beside a row, centred on its cells."""
    text = list(_wrapped(pen, prompt.text, LABEL_WIDTH - 2 * MARGIN))
    y = top + CELL // 2 - (18 + 21 * len(text)) // 2
    pen.text((MARGIN, y), prompt.tag.replace("_", " "), fill=GREY, font=SMALL_FONT)
    for number, part in enumerate(text):
        pen.text((MARGIN, y + 18 + 21 * number), part, fill="black", font=PROMPT_FONT)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text, none wider than `width` unless a single word is."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=PROMPT_FONT) > width:
            yield line
            line = word
        else:
            line = longer
    yield line


def _draw_frame(pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    left, top = (place - FRAME for place in corner)
    side = CELL + 2 * FRAME - 1
    pen.rectangle((left, top, left + side, top + side), fill=GREEN)


def _draw_caption(pen: ImageDraw.ImageDraw, corner: tuple[int, int], asked: int, seen: int) -> None:
    left, top = corner
    place = left + CELL // 2, top + CELL + FRAME + CAPTION_HEIGHT // 2
    fill = GREEN if seen == asked else RED
    pen.text(place, f"asked {asked}, seen {seen}", fill=fill, font=SMALL_FONT, anchor="mm")
