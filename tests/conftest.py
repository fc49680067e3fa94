"""Same numbers on every run: one CPU thread, fixed seeds; and shapes checked wherever the maths is called."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator

# One thread for this process and those that tests start: on a busy machine several mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from jaxtyping import install_import_hook

from tests.support.s3 import BUCKET, S3Server

# A background job of a script ignores these, and so would every process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What is imported stays: looking through it again and again takes a seventh of the time of all imports.
gc.disable()

MATHS = ("sde", "estimates", "gains", "advantages", "losses")

# Must come before the first import of the modules it names.
install_import_hook([f"sfgrpo.grpo.{module}" for module in MATHS], "beartype.beartype")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the modules with the most slow tests first, so that processes that share the modules end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among the million objects that are there by now."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for all tests that ask, with one bucket."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real Prefect server, which the flows of this process use from then on; yields the URL of its API."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield PREFECT_API_URL.value()
        # Whichever test is the last: the unclosed sockets are Prefect's own.
        warnings.simplefilter("ignore")
