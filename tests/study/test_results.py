"""Reading a study: finished runs whole, the others by name and reason."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sfgrpo.study.metrics import PHASES
from sfgrpo.study.paper import PAPER, paper_base, paper_row
from sfgrpo.study.results import final_values, load_results, mean_curve, runs_of_row, seconds_per_update
from sfgrpo.types import TAGS
from tests.support.synthetic_study import SEEDS, UPDATES, write_study

ROW = "stepwise_cfg1"


@pytest.fixture
def folder(tmp_path):
    return write_study(tmp_path / "study", rows=(ROW,))


def test_finished_runs_are_read_whole(folder):
    results = load_results(folder)
    assert list(results.runs) == [(ROW, seed) for seed in SEEDS]
    run = results.runs[ROW, 1]
    assert (run.method, run.reward, len(run.history)) == ("stepwise", "clip", UPDATES)
    assert run.samples is not None
    assert run.samples.before.shape == (4 * len(run.samples.texts), 32, 32, 3)
    assert run.samples.correct_after.shape == (len(run.samples.texts), 4)
    assert not results.unusable


def test_a_folder_that_is_not_there_has_no_runs(tmp_path):
    assert not load_results(tmp_path / "nothing").runs


def test_curves_and_final_values_are_those_of_the_evaluations(folder):
    run = load_results(folder).runs[ROW, 0]
    raw = json.loads((folder / ROW / "0" / "evaluations.json").read_text())
    curve = mean_curve([run], "geneval/overall")
    assert curve is not None
    np.testing.assert_array_equal(curve.updates, [entry["update"] for entry in raw])
    np.testing.assert_array_equal(curve.means, [entry["geneval/overall"] for entry in raw])
    assert final_values([run], "geneval/overall") == {0: raw[-1]["geneval/overall"]}
    assert mean_curve([run], "evaluation/none") is None
    assert final_values([run], "evaluation/none") == {}


def test_rows_keep_the_order_of_the_seeds_and_leave_missing_ones_out(folder):
    assert [run.seed for run in runs_of_row(load_results(folder), ROW, (2, 5, 0))] == [2, 0]


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("run.json", None, "no run.json yet"),
        ("history.json", None, "no history.json yet"),
        ("history.json", "[{", "unreadable: "),
        ("history.json", "[]", f"still running, evaluated at 0 of {UPDATES} updates"),
        ("evaluations.json", '[{"update": 30}]', f"still running, evaluated at 30 of {UPDATES} updates"),
        ("evaluations.json", "[{}]", "unreadable: 'update'"),
        ("run.json", "{}", "unreadable: "),
        ("samples.npz", "nonsense", "pickle"),
    ],
)
def test_runs_that_are_not_finished_or_damaged_are_left_out_with_a_reason(folder, file, change, reason):
    path = folder / ROW / "1" / file
    path.unlink() if change is None else path.write_text(change)
    results = load_results(folder)
    assert list(results.runs) == [(ROW, 0), (ROW, 2)]
    assert reason in results.unusable[ROW, 1]


def test_a_run_in_the_wrong_folder_is_left_out(folder):
    (folder / ROW / "1").rename(folder / ROW / "9")
    assert "is of row 'stepwise_cfg1' and seed 1" in load_results(folder).unusable[ROW, 9]


def test_a_run_without_samples_counts(folder):
    (folder / ROW / "1" / "samples.npz").unlink()
    assert load_results(folder).runs[ROW, 1].samples is None


def test_what_is_no_run_is_passed_over(folder):
    (folder / ".row.1234.partial" / "0").mkdir(parents=True)
    (folder / ROW / ".0.1234.partial").mkdir()
    (folder / ROW / "notes.txt").write_text("")
    assert len(load_results(folder).runs) == len(SEEDS)
    assert not load_results(folder).unusable


def test_seconds_are_the_median_of_whole_updates_over_all_seeds():
    history = [{f"time/{phase}_s": 1.0 * update for phase in PHASES} for update in (1, 2, 90)]
    runs = [SimpleNamespace(history=history), SimpleNamespace(history=[{"time/reward_s": 3.0}])]
    other = SimpleNamespace(history=[{"time/evaluation_s": 99.0, "time/update_s": 1.0}])
    assert seconds_per_update(runs) == np.median([5.0, 10.0, 450.0, 3.0])
    assert seconds_per_update(runs, ["reward"]) == np.median([1.0, 2.0, 90.0, 3.0])
    assert seconds_per_update([other]) == 1.0
    assert math.isnan(seconds_per_update([]))


def test_paper_means_are_those_of_its_tasks():
    for row in PAPER.values():
        tasks = [row[tag] for tag in TAGS if tag in row]
        assert not tasks or row["overall"] == pytest.approx(np.mean(tasks), abs=0.011)


def test_paper_rows_have_the_base_of_their_guidance():
    assert paper_base("Flow-GRPO cfg 1.0 PickScore") == "SD3.5-M cfg 1.0"
    assert paper_base("Stepwise cfg 4.5 GenEval, 400 GPU h") == "SD3.5-M cfg 4.5"
    assert paper_base("GPT-4o") is None
    with pytest.raises(ValueError, match=r"the paper has no row 'Stepwise'; it has 'SD3\.5-M cfg 1\.0'"):
        paper_row("Stepwise")
