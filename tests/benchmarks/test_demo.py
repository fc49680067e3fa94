"""The demo over several seeds: one commit, no seed twice, and gains with their spread."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest

from benchmarks import demo
from benchmarks.demo_summary import SeedResult, markdown, summarise_seeds
from sfgrpo.errors import ExitStatus
from sfgrpo.types import TAGS
from tests.support.clone import SMALL, build_clone, commit_all

STAND_IN = '''
"""Stands in for the stages: notes every call, and measures numbers that follow from the seed."""
import json, pathlib, sys

stage, _, params = sys.argv[1:]
given = json.loads(pathlib.Path(params).read_text())
with open("calls.txt", "a") as calls:
    calls.write(stage + "\\n")
if stage == "train" and given["seed"] == 7 and not pathlib.Path("cured").exists():
    sys.exit("the lamp is broken")
if stage == "evaluate":
    folder = pathlib.Path("reports/evaluate")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
    models = {
        name: {f"geneval/{task}": level + 0.01 * given["seed"] * (name != "base") for task in tasks}
        | {"evaluation/likeness": level}
        for name, level in (("base", 0.2), ("last", 0.3), ("policy", 0.4))
    }
    (folder / "metrics.json").write_text(json.dumps(models))
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository whose stages take no time."""
    folder = tmp_path / "checkout"
    (folder / "sfgrpo").mkdir(parents=True)
    (folder / "sfgrpo/__init__.py").touch()
    (folder / "sfgrpo/__main__.py").write_text(STAND_IN)
    (folder / "params.yaml").write_text("seed: 0\n")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    commit_all(folder)
    monkeypatch.setattr(demo, "ROOT", folder)
    return folder


def calls(out: Path, seed: int) -> list[str]:
    return (out / f"seed-{seed}/calls.txt").read_text().split()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_seed_runs_the_stages_in_a_clone_of_the_commit(checkout, tmp_path, capsys, jobs):
    out = tmp_path / "out"
    assert demo.main(["--seeds", "3", "5", "--out", str(out), "--jobs", jobs]) == ExitStatus.DONE
    commit = demo.git(checkout, "rev-parse", "HEAD")
    for seed in (3, 5):
        assert calls(out, seed) == ["prompts", "train", "evaluate"]
        assert demo.git(out / f"seed-{seed}", "rev-parse", "HEAD") == commit
        assert not demo.git(out / f"seed-{seed}", "status", "--porcelain", "--untracked-files=no")
    results = json.loads((out / "results.json").read_text())
    assert results["commit"] == commit
    assert [result["seed"] for result in results["seeds"]] == [3, 5]
    assert results["gains"]["best"]["geneval/overall"]["mean"] == pytest.approx(0.24)
    assert (out / "results.md").read_text() in capsys.readouterr().out


def test_finished_seeds_are_not_repeated_and_keep_their_commit(checkout, tmp_path):
    out = tmp_path / "out"
    assert demo.main(["--seeds", "1", "--out", str(out)]) == ExitStatus.DONE
    commit = demo.git(checkout, "rev-parse", "HEAD")
    (checkout / "params.yaml").write_text("seed: 1\n")
    commit_all(checkout)
    assert demo.main(["--seeds", "1", "2", "--out", str(out)]) == ExitStatus.DONE
    assert calls(out, 1) == calls(out, 2) == ["prompts", "train", "evaluate"]
    assert demo.git(out / "seed-2", "rev-parse", "HEAD") == commit


def test_seed_that_failed_stops_no_other_and_goes_on_when_started_again(checkout, tmp_path, capsys):
    out = tmp_path / "out"
    assert demo.main(["--seeds", "7", "1", "--out", str(out)]) == ExitStatus.FAILED
    message = capsys.readouterr().err
    assert "seed 7: `-m sfgrpo train --params seed.yaml` ended with status 1 (the lamp is broken)" in message
    assert len(json.loads((out / "results.json").read_text())["seeds"]) == 1
    (out / "seed-7/cured").touch()
    assert demo.main(["--seeds", "1", "7", "--out", str(out)]) == ExitStatus.DONE
    assert calls(out, 1) == ["prompts", "train", "evaluate"]
    assert len(json.loads((out / "results.json").read_text())["seeds"]) == 2


def test_changed_checkout_is_refused(checkout, tmp_path, capsys):
    (checkout / "params.yaml").write_text("seed: 1\n")
    assert demo.main(["--out", str(tmp_path / "out")]) == ExitStatus.WRONG_CONFIGURATION
    assert "has 1 changed files, the first is params.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["-1", "one", "1.5", str(2**32)])
def test_wrong_seed_is_refused(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        demo.main(["--seeds", wrong, "--out", str(tmp_path)])
    assert capsys.readouterr().err


def result(seed: int, gains: dict[str, float]) -> SeedResult:
    """Return a result in which the last adapter gains `gains` and the best one twice as much."""
    models = {
        model: {f"geneval/{tag}": 0.3 + times * gains.get(tag, 0.0) for tag in ("overall", *TAGS)}
        | {"evaluation/likeness": 0.5, "geneval/overall_stderr": 0.1, "agreement/num_images": 9.0}
        | {"geneval/confirmed": 0.2 + 0.1 * times, "geneval/confirmed_stderr": 0.1}
        | ({"agreement/share": 1.0} if model != "base" or seed else {})
        for times, model in enumerate(("base", "last", "best"))
    }
    return SeedResult(seed=seed, minutes=8.0 + seed, models=models)


def test_gains_are_taken_within_a_seed_and_spread_over_seeds():
    values = [0.10, 0.14, 0.18]
    summary = summarise_seeds([result(seed, {"overall": value}) for seed, value in enumerate(values)])
    gain = summary["gains"]["last"]["geneval/overall"]
    assert gain["mean"] == pytest.approx(statistics.fmean(values))
    assert gain["std"] == pytest.approx(0.04)
    assert gain["stderr"] == pytest.approx(0.04 / 3**0.5)
    assert summary["gains"]["best"]["geneval/overall"]["mean"] == pytest.approx(0.28)
    assert summary["minutes"]["mean"] == pytest.approx(9.0)


def test_task_moves_only_beyond_its_standard_error():
    # Standard errors: counting 0.01, colors 0.03, position 0.01.
    results = [
        result(0, {"counting": 0.04, "colors": 0.05, "position": -0.03}),
        result(1, {"counting": 0.06, "colors": -0.01, "position": -0.01}),
    ]
    moved = summarise_seeds(results)["beyond_standard_error"]["last"]
    assert moved == {"up": ["counting"], "down": ["position"]}


def test_single_seed_has_no_spread_and_moves_no_task():
    summary = summarise_seeds([result(0, {"counting": 0.4})])
    assert summary["gains"]["last"]["geneval/counting"]["stderr"] is None
    assert summary["beyond_standard_error"]["best"] == {"up": [], "down": []}
    assert "| 0 | 0.300 | 0.300 | 0.300 | +0.000 | +0.000 | 8.0 |" in markdown({"commit": "0" * 40} | summary)


def test_tables_show_seeds_tasks_and_what_moved():
    summary = summarise_seeds([result(0, {"counting": 0.04}), result(1, {"counting": 0.06})])
    text = markdown({"commit": "0123456789abcdef"} | summary)
    assert text.startswith("# Demo over 2 seeds, commit 0123456789ab\n")
    counting = "| Counting | 0.300 | 0.350 | 0.400 | +0.050 ± 0.014 ▲ | 0.010 | +0.100 ± 0.028 ▲ | 0.020 |"
    assert counting in text
    assert "- last adapter: 1 of 6 tasks up by more than the standard error (Counting), 0 down (none)" in text
    assert "| evaluation/likeness | 0.500 |" in text
    assert "| geneval/confirmed | 0.200 | 0.300 | 0.400 | +0.100 ± 0.000 ▲ | 0.000 |" in text
    assert not any(name in text for name in ("stderr", "num_images"))
    assert "agreement/share" not in text, "the base model of seed 0 has none"


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no result of any seed"):
        summarise_seeds([])


@pytest.mark.slow
def test_real_stages_measure_base_last_and_best(tmp_path):
    clone = build_clone(tmp_path / "checkout", SMALL)
    clone.run("benchmarks.demo", "--seeds", "0", "--out", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    (measured,) = results["seeds"]
    assert set(measured["models"]) == {"base", "last", "best"}
    assert 0.0 <= measured["models"]["best"]["geneval/overall"] <= 1.0
    assert (tmp_path / "out/seed-0/reports/evaluate/images.tar").exists()
