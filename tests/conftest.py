"""Same numbers on every run: one CPU thread, fixed seeds; and shapes checked wherever the maths is called."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

MATHS = ("schedule", "sde", "estimates", "gains", "advantages", "losses")

# Must come before the first import of the modules it names.
install_import_hook([f"sfgrpo.{module}" for module in MATHS], "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
