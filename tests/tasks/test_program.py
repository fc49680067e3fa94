"""The last line of a flow that was told to stop."""

from __future__ import annotations

import sys

import pytest

from tasks import program
from tasks.program import STARTED_BY, last_line

SAVED = "its state after update 3 is saved, and starting it again goes on"


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ({}, "stopped: no stage was running; start it again: make demo"),
        ({"train": SAVED}, f"stopped in stage train: {SAVED}: make demo"),
        (
            {"train": ""},
            "stopped in stage train: it said nothing of a state that is saved, see logs/train.log; start it again: "
            "make demo",
        ),
        (
            {"short@a-0": SAVED, "short@b-0": ""},
            "stopped in 2 stages; what each has saved is in the last line of logs/*.log; go on: make demo",
        ),
    ],
)
def test_last_line_says_what_is_saved_and_what_goes_on(stages, line, monkeypatch):
    monkeypatch.setenv(STARTED_BY, "make demo")
    monkeypatch.setattr(program, "unfinished_stages", lambda: stages)
    assert last_line() == line


def test_command_of_the_process_goes_on_where_nothing_else_was_typed(monkeypatch):
    monkeypatch.delenv(STARTED_BY, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "flows.train_policy"])
    monkeypatch.setattr(program, "unfinished_stages", lambda: {})
    assert last_line().endswith("start it again: python -m flows.train_policy")
