import io
import sys

import pytest

from sfgrpo.tracking.progress import Progress, progress_line

METRICS = {
    "reward/mean": 0.4119,
    "gain/mean": 0.03,
    "policy/clip_fraction": 0.123,
    "optim/grad_norm": 0.8,
    "other": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Returns the given times one by one, then fails."""

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def __call__(self) -> float:
        return next(self.times)


def test_line_shows_the_metrics_in_a_fixed_order():
    assert progress_line(12, 60, METRICS) == "update 12/60  reward 0.412  gain 0.030  clip 0.12  grad 0.80"


def test_absent_metrics_are_left_out():
    assert progress_line(1, 2, {"reward/mean": 1.0}) == "update 1/2  reward 1.000"


def test_plain_lines_go_to_standard_output(capsys):
    with Progress(60, 192, clock=Clock(0.0, 10.0, 30.0)) as progress:
        progress.show(0, {"reward/mean": 0.5})
        progress.show(1, {})
    assert capsys.readouterr().out.splitlines() == [
        "update 1/60  reward 0.500  19.2 img/s  eta 09:50",
        "update 2/60  12.8 img/s  eta 14:30",
    ]


def test_updates_before_a_resume_do_not_count_as_fast_ones(capsys):
    with Progress(60, 100, first_update=50, clock=Clock(0.0, 10.0)) as progress:
        progress.show(50, {})
    assert capsys.readouterr().out == "update 51/60  10.0 img/s  eta 01:30\n"


def test_long_runs_show_hours(capsys):
    with Progress(1000, 10, clock=Clock(0.0, 60.0)) as progress:
        progress.show(0, {})
    assert capsys.readouterr().out.endswith("eta 16:39:00\n")


def test_terminal_gets_a_bar_that_ends_on_the_last_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    with Progress(2, 10, file=terminal, clock=Clock(0.0, 1.0, 2.0)) as progress:
        progress.show(0, METRICS)
        progress.show(1, METRICS)
    assert "\x1b[" in terminal.getvalue()
    assert "update 2/2  reward 0.412" in terminal.getvalue()


@pytest.mark.parametrize(("file", "used"), [(io.StringIO(), False), (Terminal(), True)])
def test_rich_is_used_on_a_terminal_only(monkeypatch, file, used):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    Progress(2, 10, file=file)
    assert ("rich.progress" in sys.modules) is used


def test_bar_is_closed_after_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with pytest.raises(RuntimeError, match="inside"), Progress(2, 10, file=terminal):
        raise RuntimeError("inside")
    assert terminal.getvalue().endswith("\x1b[?25h")
