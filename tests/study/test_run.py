"""A study of seconds, for real: runs train, resume, share one MLflow run as parent, and a report is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sfgrpo.cli import main
from sfgrpo.rewards import REWARDS
from sfgrpo.tracking.mlflow_client import connect
from sfgrpo.tracking.mlflow_run import PARENT_TAG
from tests.support.tiny import Light
from tests.support.tiny_run import build_tiny_project

FLOW_GRPO, STEPWISE = "flow_grpo_tiny", "stepwise_tiny"
PLAN = {
    "tiny": {
        "seeds": [0, 3],
        "num_updates": 2,
        "evaluate_every_num_updates": 1,
        "rows": {FLOW_GRPO: "Flow-GRPO", STEPWISE: "Stepwise"},
        "pairs": [{"title": "Tiny", "flow_grpo": FLOW_GRPO, "stepwise": STEPWISE}],
        "ablations": [],
    }
}

pytestmark = [
    pytest.mark.slow,
    # MLflow's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    build_tiny_project(folder)
    rows = folder / "experiments/shapes"
    rows.mkdir(parents=True)
    (folder / "experiments/study.yaml").write_text(json.dumps(PLAN))
    (rows / f"{FLOW_GRPO}.yaml").write_text(
        "extends: ../../params.yaml\nadvantage: {credit: terminal}\nevaluation: {training_sampler: true}\n"
    )
    (rows / f"{STEPWISE}.yaml").write_text(f"extends: {FLOW_GRPO}.yaml\nadvantage: {{credit: joint}}\n")
    return folder


def tracking_uri(project: Path) -> str:
    """Return the absolute address: MLflow keeps one connection per address, whatever the working directory."""
    return f"sqlite:///{project / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(project)
    monkeypatch.setenv("SFGRPO_DEVICE", "cpu")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
    monkeypatch.setitem(REWARDS, "light", Light)
    yield


@pytest.fixture(scope="module")
def runs(project: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("SFGRPO_DEVICE", "cpu")
        patch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
        patch.setitem(REWARDS, "light", Light)
        for row in (FLOW_GRPO, STEPWISE):
            for seed in PLAN["tiny"]["seeds"]:
                assert main(["study", "run", "tiny", row, str(seed)]) == 0
    return project / "study/tiny"


def test_run_writes_what_the_report_reads(runs):
    run = runs / STEPWISE / "3"
    description = json.loads((run / "run.json").read_text())
    assert (description["row"], description["seed"], description["method"]) == (STEPWISE, 3, "stepwise")
    assert [each["update"] for each in json.loads((run / "history.json").read_text())] == [1, 2]
    evaluations = json.loads((run / "evaluations.json").read_text())
    assert [each["update"] for each in evaluations] == [0, 1, 2]
    assert evaluations[0].keys() >= {"geneval/overall", "evaluation/light", "evaluation_noisy/light"}
    samples = np.load(run / "samples.npz")
    assert len(samples["before"]) == len(samples["after"]) == samples["correct_after"].size


def test_methods_start_from_the_same_prompts_noise_and_weights(runs):
    first = [json.loads((runs / row / "0/evaluations.json").read_text())[0] for row in (FLOW_GRPO, STEPWISE)]
    measured = ("time/", "memory/")
    assert {key: value for key, value in first[0].items() if not key.startswith(measured)} == {
        key: value for key, value in first[1].items() if not key.startswith(measured)
    }
    histories = [json.loads((runs / row / "0/history.json").read_text()) for row in (FLOW_GRPO, STEPWISE)]
    assert histories[0][0]["reward/mean"] == pytest.approx(histories[1][0]["reward/mean"], abs=1e-6)
    assert histories[0][1]["reward/mean"] != histories[1][1]["reward/mean"]


def test_runs_are_tracked_under_one_parent(runs, project):
    client = connect(tracking_uri(project))
    experiment = client.get_experiment_by_name("sfgrpo-study")
    tracked = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in tracked if PARENT_TAG not in run.data.tags]
    children = [run for run in tracked if PARENT_TAG in run.data.tags]
    assert {run.data.tags[PARENT_TAG] for run in children} == {parent.info.run_id}
    assert sorted(run.info.run_name for run in children) == [
        f"{row} seed {seed}" for row in (FLOW_GRPO, STEPWISE) for seed in (0, 3)
    ]


def test_finished_run_is_not_trained_again(runs, monkeypatch):
    before = (runs / FLOW_GRPO / "0/history.json").read_bytes()
    assert main(["study", "run", "tiny", FLOW_GRPO, "0"]) == 0
    assert (runs / FLOW_GRPO / "0/history.json").read_bytes() == before


def test_report_is_one_page_with_figures_and_plots(runs, project):
    assert main(["study", "report", "tiny"]) == 0
    report = project / "reports/study/tiny"
    page = (report / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "")
    plotted = json.loads((report / "training_sampler.json").read_text())
    assert [record["update"] for record in plotted] == [0, 1, 2]
    assert plotted[0].keys() == {"update", FLOW_GRPO, STEPWISE}


def test_report_without_runs_says_what_fills_it(tmp_path, project, monkeypatch, capsys):
    (tmp_path / "experiments").symlink_to(project / "experiments")
    monkeypatch.chdir(tmp_path)
    assert main(["study", "report", "tiny"]) == 1
    assert "study/tiny does not exist; `make study FORM=tiny` fills it" in capsys.readouterr().err
