"""Same numbers on every run: one CPU thread, fixed seeds; and shapes checked wherever the maths is called."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

from tests.support.s3 import BUCKET, S3Server

MATHS = ("schedule", "sde", "estimates", "gains", "advantages", "losses")

# Must come before the first import of the modules it names.
install_import_hook([f"sfgrpo.grpo.{module}" for module in MATHS], "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for all tests that ask, with one bucket."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket=BUCKET)
        yield server
