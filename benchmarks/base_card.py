"""Measure the shipped base model again and write the numbers into its card: `python -m benchmarks.base_card`.

A new detector changes what the model is seen to draw, and not the model.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from sfgrpo.config.stages import PretrainStage, load_config
from sfgrpo.geneval.table import markdown_table
from sfgrpo.paths import PARAMS
from sfgrpo.pretraining.autoencoder import detection_survival
from sfgrpo.pretraining.base_model import BASE_MODEL, NUM_SURVIVAL_IMAGES, geneval_tables
from sfgrpo.pretraining.dataset import render_pictures
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.manifest import write_manifest

CARD = BASE_MODEL / "README.md"
SURVIVAL = re.compile(r"[\d.]+%(?= of the detections)")
TABLE = re.compile(r"^\|[^\n]*Overall.*\Z", re.MULTILINE | re.DOTALL)


def renewed_card(card: str, survival: float, table: str) -> str:
    """Return a card with other numbers.

    Raises:
        ValueError: it lacks one of the two places.
    """
    # A table and a percentage have no backslash, so that `subn` takes them as they are.
    for pattern, text in ((SURVIVAL, f"{survival:.1%}"), (TABLE, f"{table}\n")):
        card, number = pattern.subn(text, card)
        if number != 1:
            raise ValueError(f"{CARD}: {number} places match {pattern.pattern!r}; there should be one")
    return card


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, rewrite card and manifest, print the table; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.base_card", description=str(__doc__).split("\n\n")[0]
    ).parse_args(arguments)
    set_up_logging()

    def run() -> None:
        stage = load_config(PretrainStage, Path(PARAMS))
        # The pictures of the card's own survival rate: see pretrain_base_model.
        fresh = render_pictures(NUM_SURVIVAL_IMAGES, stage.pretrain.task_weights, stage.seed + 1).images
        autoencoder = AutoencoderKL.from_pretrained(BASE_MODEL / "vae", use_safetensors=True).eval()
        table = markdown_table(geneval_tables(BASE_MODEL, stage.pretrain))
        survival = detection_survival(autoencoder, fresh)
        atomic_write(CARD, renewed_card(CARD.read_text(encoding="utf-8"), survival, table))
        write_manifest(BASE_MODEL)
        print(table)

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
