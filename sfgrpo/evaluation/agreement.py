"""How far an independent counter confirms GenEval's verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sfgrpo.geneval.scorer import asks_for_a_number
from sfgrpo.geneval.table import GenEvalTable, summarise
from sfgrpo.types import Prompt

LOW_AGREEMENT = 0.8
"""Share of confirmed images below which a person is warned."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Verdicts that a counter confirms, beside GenEval's own."""

    confirmed_PG: NDArray[np.bool_]
    """Whether an image is correct and, where its prompt asks for a number, the counter sees as many objects."""
    table: GenEvalTable
    """Table of the confirmed verdicts."""
    num_correct: int
    """Correct images of the prompts that ask for a number."""
    num_confirmed: int
    """Those of them that the counter confirms."""

    @classmethod
    def of(cls, prompts: Sequence[Prompt], correct_PG: NDArray[np.bool_], confirmed_PG: NDArray[np.bool_]) -> Agreement:
        """Compare GenEval's verdicts on the images of all prompts with the confirmed ones."""
        counted_P = np.array([asks_for_a_number(prompt) for prompt in prompts], dtype=bool)
        return cls(
            confirmed_PG=confirmed_PG,
            table=summarise([prompt.tag for prompt in prompts], confirmed_PG),
            num_correct=int(correct_PG[counted_P].sum()),
            num_confirmed=int(confirmed_PG[counted_P].sum()),
        )

    @property
    def share(self) -> float | None:
        """Share of the correct images of prompts that ask for a number that the counter confirms; None without any."""
        return self.num_confirmed / self.num_correct if self.num_correct else None

    @property
    def warning(self) -> str | None:
        """A sentence for a person where the agreement is low."""
        if self.share is None or self.share >= LOW_AGREEMENT:
            return None
        return (
            f"an independent counter confirms only {self.num_confirmed} of the {self.num_correct} images that are "
            "correct for a prompt that asks for a number: the others may show objects that the detector does not "
            "count, so look at them before you believe the counting score"
        )

    def to_dict(self) -> dict[str, float]:
        """Return metrics; the share is left out where there is none."""
        metrics = {
            "geneval/confirmed": self.table.overall.mean,
            "geneval/confirmed_stderr": self.table.overall.stderr,
            "agreement/num_images": float(self.num_correct),
        }
        if "counting" in self.table.tasks:
            metrics["geneval/confirmed_counting"] = self.table.tasks["counting"].mean
        return metrics if self.share is None else metrics | {"agreement/share": self.share}
