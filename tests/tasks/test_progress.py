"""The bar of a training: every few seconds, to the end, and never in the way of the training."""

from __future__ import annotations

import logging
from uuid import uuid4

import httpx
import pytest

from tasks import progress
from tasks.progress import ProgressBar


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
    """A stub of the server, whose real behaviour the tests of deployments check."""
    messages: list[tuple[str, float, str]] = []

    def create(percent, key, description):
        messages.append(("create", percent, description))
        return uuid4()

    def update(artifact, percent, description):
        messages.append(("update", percent, description))

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", update)
    monkeypatch.setattr(progress, "get_run_logger", lambda: logging.getLogger("progress"))
    return messages


def test_updates_show_as_percentages_of_one_bar_and_other_lines_do_not(sent):
    clock = Clock()
    bar = ProgressBar("training", clock)
    for line in ("resuming after update 9", "update 10/40  reward 0.4", "drawing", "update 20/40  reward 0.5"):
        bar.show(line)
        clock.now += 10
    assert sent == [("create", 25.0, "update 10/40  reward 0.4"), ("update", 50.0, "update 20/40  reward 0.5")]


def test_fast_updates_are_thinned_out_but_the_last_one_is_shown(sent):
    clock = Clock()
    bar = ProgressBar("training", clock)
    for update in range(1, 101):
        bar.show(f"update {update}/100")
        clock.now += 0.5
    assert len(sent) == 11
    assert sent[-1][1] == 100.0


def test_a_server_that_is_away_costs_one_warning_and_the_bar_goes_on_later(sent, monkeypatch, caplog):
    clock = Clock()
    bar = ProgressBar("training", clock)
    bar.show("update 1/4")
    real = progress.update_progress_artifact

    def away(*arguments, **options):
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(progress, "update_progress_artifact", away)
    for update in (2, 3):
        clock.now += 10
        bar.show(f"update {update}/4")
    monkeypatch.setattr(progress, "update_progress_artifact", real)
    bar.show("update 4/4")
    assert [message[1] for message in sent] == [25.0, 100.0]
    assert [record.message for record in caplog.records] == [
        "the bar of the training stands still, the training does not: nobody there"
    ]
