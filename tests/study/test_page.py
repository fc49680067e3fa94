"""The report: one file that needs no network, whose numbers are the measures and whose words claim no more."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sfgrpo.study.figures import draw_figures, svg_of
from sfgrpo.study.metrics import difference, reach
from sfgrpo.study.page import html as page_of
from sfgrpo.study.page import inlined, markdown
from sfgrpo.study.paper import PAPER
from sfgrpo.study.report import plots_of
from sfgrpo.study.results import load_results
from sfgrpo.study.summary import summarise
from sfgrpo.study.tables import ablation_table, overview_table
from sfgrpo.study.text import DASH, MINUS, TIMES, digits_for, number, ratio, signed, significance
from tests.support.synthetic_study import EVERY, ROWS, SEEDS, UPDATES, make_plan, write_study

PAIR = ("flow_grpo_cfg1", "stepwise_cfg1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def summary(folder):
    return summarise(make_plan(), load_results(folder))


@pytest.fixture(scope="module")
def drawings(summary):
    return {name: svg_of(figure) for name, figure in draw_figures(summary).items()}


@pytest.fixture(scope="module")
def page(summary, drawings):
    return page_of(summary, drawings)


def text_of(page: str) -> str:
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def rows_of_tables(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, flags=re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)] for row in rows]


def evaluations(folder: Path, row: str, seed: int) -> list[dict[str, float]]:
    return json.loads((folder / row / str(seed) / "evaluations.json").read_text())


def edit_rewards(folder: Path, row: str, change) -> None:
    """Changes the reward of every evaluation of a row, `change(update, reward)`."""
    for path in folder.glob(f"{row}/*/evaluations.json"):
        entries = json.loads(path.read_text())
        for entry in entries:
            for name in ("evaluation_noisy/clip", "evaluation/clip"):
                entry[name] = change(entry["update"], entry[name])
        path.write_text(json.dumps(entries))


def test_page_loads_nothing_from_anywhere(page):
    references = re.findall(r'(?:\b(?:src|href|data|action)=|url\()\s*["\']?([^"\')\s>]+)', page)
    assert references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page


def test_every_figure_is_in_the_page_once(page, drawings):
    for name in drawings:
        assert page.count(f'<figure id="{name}">') == 1
    assert page.count("<svg") == page.count("<figure") == 11


def test_identifiers_are_unique_over_all_figures(page):
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert used <= set(identifiers)


def test_ratios_on_the_page_are_the_measures(page, folder):
    shares = []
    for seed in SEEDS:
        flow_grpo, stepwise = (evaluations(folder, row, seed) for row in PAIR)
        updates = [entry["update"] for entry in flow_grpo]
        rewards = [[entry["evaluation_noisy/clip"] for entry in entries] for entries in (stepwise, flow_grpo)]
        shares.append(reach(updates, rewards[0], updates, rewards[1]).ratio)
    row = next(row for row in rows_of_tables(page) if row and row[0] == "Updates, training sampler")
    assert [cell.split()[0] for cell in row[1:]] == [f"{x:.2f}" for x in (*shares, np.median(shares), 0.5)] + ["met"]
    assert f"{np.median(shares):.2f} of Flow-GRPO's updates to its final reward met, target 0.50" in text_of(page)


def test_geneval_on_the_page_is_that_of_the_evaluations_beside_the_papers(page, folder):
    finals = [100 * evaluations(folder, PAIR[1], seed)[-1]["geneval/position"] for seed in SEEDS]
    rows = {row[0]: row for row in reversed(rows_of_tables(page)) if row}
    assert rows["Stepwise"][6] == f"{np.mean(finals) / 100:.2f} ± {np.std(finals, ddof=1) / 100:.2f}"
    assert rows["Base model"][6] == f"{evaluations(folder, PAIR[0], 0)[0]['geneval/position']:.2f}"
    paper = [f"{value:.2f}" for value in PAPER["Stepwise cfg 1.0 PickScore"].values()]
    assert rows["Paper: Stepwise cfg 1.0 PickScore"][1:] == paper


def test_geneval_difference_has_paired_and_pooled_error(page, folder):
    stepwise, flow_grpo = (
        {seed: evaluations(folder, row, seed)[-1]["geneval/overall"] for seed in SEEDS} for row in reversed(PAIR)
    )
    gap = difference(stepwise, flow_grpo)
    row = next(row for row in rows_of_tables(page) if row and row[0].startswith("Difference"))
    assert row[1] == f"{gap.mean:+.3f} ± {gap.paired_stderr:.3f}, {gap.pooled_stderr:.3f}"


def test_cost_on_the_page_is_the_median_and_its_ratio(page, folder):
    seconds = {}
    for name in (PAIR[0], "stepwise_5_substeps"):
        histories = [json.loads((folder / name / str(seed) / "history.json").read_text()) for seed in SEEDS]
        sums = [sum(v for k, v in entry.items() if k.startswith("time/")) for history in histories for entry in history]
        seconds[name] = np.median(sums)
    row = next(row for row in rows_of_tables(page) if row and row[0] == "Stepwise, 5 substeps" and len(row) > 7)
    share = seconds["stepwise_5_substeps"] / seconds[PAIR[0]]
    assert row[-4:] == [f"{seconds['stepwise_5_substeps']:.2f}", f"{TIMES}{share:.2f}", "1.7", "missed"]


def test_cheapest_stepwise_row_has_the_lower_target(summary):
    costs = summary.costs
    cheapest = min((cost for cost in costs if cost.label.startswith("Stepwise")), key=lambda cost: cost.seconds)
    assert [cost.label for cost in costs if 1.3 in cost.targets] == [cheapest.label]


def test_rows_of_one_label_are_told_apart_by_their_pairs(tmp_path):
    study = write_study(tmp_path, rows=("stepwise_cfg1", "stepwise_geneval", "stepwise_per_step"), seeds=(0,))
    for row in ("stepwise_cfg1", "stepwise_geneval"):
        path = study / row / "0" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"label": "Stepwise"}))
    labels = [cost.label for cost in summarise(make_plan(), load_results(study)).costs]
    assert labels[:2] == ["Stepwise (CLIP reward, guidance 1)", "Stepwise (GenEval reward, guidance 4.5)"]
    assert labels[2] == "Stepwise, each step alone"


def test_ablation_rows_have_their_paired_differences(folder, summary):
    one = summary.ablations[0]
    finals = {
        row: {seed: evaluations(folder, row, seed)[-1]["evaluation_noisy/clip"] for seed in SEEDS}
        for row in one.ablation.rows
    }
    reference, per_step, _ = finals.values()
    gap = difference(per_step, reference)
    compared = ablation_table(one).rows[1][2]
    assert (compared.text, compared.note) == (f"{signed(gap.mean, 4)} ± {gap.std:.4f}", "beyond the spread")


def test_rows_with_other_samplers_are_compared_without_noise(summary):
    by_title = {one.ablation.title: one for one in summary.ablations}
    assert by_title["Sampler"].metric == "evaluation/clip"
    assert by_title["Substeps of a clean estimate"].metric == "evaluation_noisy/clip"


def test_an_ablation_without_its_first_row_compares_nothing(tmp_path):
    study = write_study(tmp_path, rows=("stepwise_per_step", "stepwise_step_mean"))
    one = summarise(make_plan(), load_results(study)).ablations[0]
    assert len(one.rows) == 2
    assert [row[2].text for row in ablation_table(one).rows] == [DASH, DASH]


def test_missing_runs_are_listed_and_nothing_breaks(tmp_path):
    study = write_study(tmp_path / "study", rows=(*PAIR, "stepwise_per_step"), seeds=(0, 2))
    (study / "stepwise_cfg1" / "2" / "history.json").write_text("[]")
    summary = summarise(make_plan(), load_results(study))
    said = text_of(page := page_of(summary, {}))
    assert "5 of 27 runs, seeds 0, 1, 2; preliminary" in said
    assert ["stepwise_cfg1", "2", f"still running, evaluated at 0 of {UPDATES} updates"] in rows_of_tables(page)
    assert ["stepwise_geneval", "0, 1, 2", "not there yet"] in rows_of_tables(page)
    assert "No seed of this pair has both methods yet." in said
    assert "(one seed)" in markdown(summary, {})


@pytest.mark.parametrize("rows", [(), PAIR[:1], PAIR[1:], ("stepwise_ddim",)])
def test_a_study_that_has_hardly_begun_has_a_page(tmp_path, rows):
    summary = summarise(make_plan(), load_results(write_study(tmp_path / "study", rows=rows, seeds=(1,))))
    assert "there is nothing to compare" in text_of(page_of(summary, {}))
    assert "there is nothing to compare" in markdown(summary, {})


def test_a_reward_that_is_never_reached_is_not_called_reached(tmp_path):
    study = write_study(tmp_path, rows=PAIR)
    edit_rewards(study, "stepwise_cfg1", lambda update, reward: 0.26)
    summary = summarise(make_plan(), load_results(study))
    assert summary.pairs[0].ratios[0].median == math.inf
    assert [entry.text for entry in overview_table(summary).rows[0][1:4]] == ["not reached"] * 3
    row = next(row for row in rows_of_tables(page_of(summary, {})) if row and row[0] == "Updates, training sampler")
    assert row[-3:] == ["not reached", "0.50", "missed"]


def test_a_baseline_that_gains_nothing_gives_no_ratio(tmp_path):
    study = write_study(tmp_path, rows=PAIR)
    edit_rewards(study, "flow_grpo_cfg1", lambda update, reward: 0.3 - 1e-4 * update)
    summary = summarise(make_plan(), load_results(study))
    assert not summary.pairs[0].ratios[0].is_met
    assert [entry.text for entry in overview_table(summary).rows[0][1:4]] == ["no rise"] * 3


def test_overview_marks_a_target_that_is_missed(tmp_path):
    study = write_study(tmp_path, rows=PAIR)
    edit_rewards(study, "stepwise_cfg1", lambda update, reward: 0.26 + 0.0005 * update)
    row = overview_table(summarise(make_plan(), load_results(study))).rows[0]
    assert [entry.note for entry in row[1:3]] == ["missed, target 0.50", "missed, target 0.80"]


def test_markdown_links_the_figures_that_there_are(summary, drawings):
    links = re.findall(r"!\[[^]]+\]\(images/study/(\w+)\.svg\)", markdown(summary, drawings))
    assert sorted(links) == sorted(drawings)
    assert "](images" not in markdown(summary, {})


def test_markdown_and_page_have_the_same_rows(summary, page):
    lines = [line.strip("| ").split(" | ") for line in markdown(summary, {}).splitlines() if line.startswith("| ")]
    said = [[cell.replace("(", "").replace(")", "").strip() for cell in line] for line in lines if "---" not in line[0]]
    for row in rows_of_tables(page):
        cleaned = [cell.replace("(", "").replace(")", "").strip() for cell in row]
        assert not row or any([cell for cell in line if cell] == [cell for cell in cleaned if cell] for line in said)


def test_plots_have_the_mean_over_seeds_of_every_row_and_update(folder, summary):
    plots = plots_of(summary)
    assert [record["update"] for record in plots["geneval"]] == list(range(0, UPDATES + 1, EVERY))
    assert all(record.keys() == {"update", *ROWS} for record in plots["geneval"])
    finals = [evaluations(folder, PAIR[1], seed)[-1]["evaluation_noisy/clip"] for seed in SEEDS]
    assert plots["training_sampler"][-1][PAIR[1]] == pytest.approx(np.mean(finals))


def test_inlined_drawings_keep_no_size_and_no_names_of_their_own():
    svg = '<?xml version="1.0"?>\n<svg width="9pt" height="8pt" viewBox="0 0 9 8"><metadata>\nm</metadata><g id="a"/>'
    expected = (
        '<svg viewBox="0 0 9 8" role="img" aria-label="my figure"><g id="my_figure-a"/><use href="#my_figure-a"/></svg>'
    )
    assert inlined(f'{svg}<use href="#a"/></svg>', "my_figure") == expected


def test_numbers_are_written_as_one_reads_them():
    assert (number(-0.5), number(-0.0001), number(math.nan), number(None)) == (f"{MINUS}0.50", "0.00", DASH, DASH)
    assert (signed(0.5), signed(-0.5), signed(-1e-9)) == ("+0.500", f"{MINUS}0.500", "0.000")
    assert (ratio(0.5), ratio(math.inf), ratio(math.nan)) == ("0.50", "not reached", "no rise")
    assert [digits_for([spread]) for spread in (0.5, 0.012, 0.0012, 1e-9, math.nan)] == [3, 3, 4, 5, 3]


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((0.30, 0.31, 0.32), "beyond the spread"),
        ((-0.30, -0.31, -0.32), "beyond the spread"),
        ((0.1, 0.3, 0.9), "within the spread, same sign in all seeds"),
        ((-0.1, -0.9), "within the spread, same sign in all seeds"),
        ((-0.1, 0.3, 0.2), "within the spread"),
        ((0.0, 0.0, 0.0), "within the spread"),
        ((0.4,), "one seed"),
    ],
)
def test_differences_are_judged_by_their_spread(gaps, words):
    assert significance(difference(dict(enumerate(gaps)), dict.fromkeys(range(len(gaps)), 0.0))) == words
