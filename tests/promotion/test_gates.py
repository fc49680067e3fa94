"""Promotion: the interval against scipy and against repeated evaluations, and every gate against a planted failure."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

from sfgrpo.promotion.bootstrap import expanded, interval, resampled_means, task_means
from sfgrpo.promotion.diversity import diversity
from sfgrpo.promotion.gates import Decision, ModelScores, decide
from sfgrpo.types import TAGS, Prompt

GATES = ("overall", "tasks", "held_out", "diversity")


def prompts_of(per_task: int | dict[str, int]) -> list[Prompt]:
    counts = per_task if isinstance(per_task, dict) else dict.fromkeys(TAGS, per_task)
    return [
        Prompt(text=f"{tag} {index}", tag=tag, include=()) for tag, count in counts.items() for index in range(count)
    ]


def tags_of(prompts):
    return [prompt.tag for prompt in prompts]


def evidence(generator, prompts, ability_P, *, group=4, reward=0.0, spread=1.0) -> ModelScores:
    """Draws what judges may say of a model that solves prompt p with probability `ability_P[p]`."""
    shape = (len(prompts), group)
    return ModelScores(
        prompts=prompts,
        noise_seed=0,
        correct_PG=generator.random(shape) < np.reshape(ability_P, (-1, 1)),
        held_out_PG=generator.normal(reward, 0.5, shape),
        training_PG=generator.normal(reward, 0.5, shape).astype(np.float32),
        diversity_P=spread * generator.uniform(0.1, 0.3, len(prompts)),
    )


def abilities(generator, prompts):
    return generator.beta(0.6, 0.4, size=len(prompts))


def equal(prompts, *, correct=True, group=2, spread=0.2) -> ModelScores:
    """Makes evidence in which all prompts and images are alike."""
    shape = (len(prompts), group)
    return ModelScores(
        prompts=prompts,
        noise_seed=0,
        correct_PG=np.full(shape, correct),
        held_out_PG=np.zeros(shape),
        training_PG=np.zeros(shape),
        diversity_P=np.full(len(prompts), spread),
    )


def better_pair(per_task: int | dict[str, int] = 20) -> tuple[ModelScores, ModelScores]:
    """A candidate that passes every gate, and its champion."""
    generator, prompts = np.random.default_rng(0), prompts_of(per_task)
    ability = 0.7 * abilities(generator, prompts)
    return evidence(generator, prompts, ability + 0.3, reward=0.2), evidence(generator, prompts, ability)


def bounds_of(decision: Decision, figure: str):
    return next(gate.observed[figure] for gate in decision.gates if figure in gate.observed)


def bootstrapped(tags, values_PJ, statistic, tail=0.05, num_resamples=10_000):
    means = resampled_means(tags, values_PJ, num_resamples, np.random.default_rng(7)).mean(axis=1)
    return interval(statistic(task_means(tags, values_PJ).mean(axis=0)), statistic(means.T), tail)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_paired_interval_is_scipys_with_one_prompt_less_drawn(method):
    generator = np.random.default_rng(3)
    ability = generator.random((60, 1))
    one, other = ((generator.random((60, 4)) < ability + gain).mean(axis=1) for gain in (0.1, 0.0))
    found = bootstrapped(["colors"] * 60, (one - other)[:, None], lambda means: means[0])
    theirs = bootstrap(
        (one, other),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        method=method,
        confidence_level=0.9,
        n_resamples=10_000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    wider = math.sqrt(60 / 59)
    expected = [found.estimate + wider * (bound - found.estimate) for bound in theirs]
    np.testing.assert_allclose([found.lower, found.upper], expected, atol=0.06 * (theirs.high - theirs.low))


def test_interval_of_the_overall_score_is_scipys_of_independent_tasks():
    generator, counts = np.random.default_rng(5), {"counting": 80, "colors": 40, "position": 150}
    tags = tags_of(prompts_of(counts))
    gains = generator.choice([-0.25, 0.0, 0.5], len(tags))
    found = bootstrapped(tags, gains[:, None], lambda means: means[0])
    theirs = bootstrap(
        [gains[np.asarray(tags) == tag] for tag in counts],
        lambda *tasks, axis: np.mean([task.mean(axis=axis) for task in tasks], axis=0),
        method="percentile",
        confidence_level=0.9,
        n_resamples=10_000,
        rng=np.random.default_rng(6),
    ).confidence_interval
    np.testing.assert_allclose([found.lower, found.upper], theirs, atol=0.04 * (theirs.high - theirs.low))


def test_interval_of_the_diversity_ratio_is_scipys():
    generator, prompts = np.random.default_rng(8), prompts_of({"colors": 200})
    one, other = (evidence(generator, prompts, np.full(200, 0.5), spread=spread) for spread in (0.9, 1.0))
    found = bounds_of(decide(one, other), "diversity_ratio")
    theirs = bootstrap(
        (one.diversity_P, other.diversity_P),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        confidence_level=0.9,
        n_resamples=10_000,
        rng=np.random.default_rng(9),
    ).confidence_interval
    np.testing.assert_allclose([found.lower, found.upper], theirs, atol=0.04 * (theirs.high - theirs.low))


@pytest.mark.parametrize("num_prompts", [3, 10, 80])
def test_resampled_means_spread_by_the_clustered_standard_error(num_prompts):
    values = np.random.default_rng(num_prompts).normal(size=(num_prompts, 1))
    means = resampled_means(["colors"] * num_prompts, values, 20_000, np.random.default_rng(0))
    assert means.std() == pytest.approx(values.std(ddof=1) / math.sqrt(num_prompts), rel=0.03)


def test_figures_of_a_prompt_are_drawn_together():
    generator, tags = np.random.default_rng(0), tags_of(prompts_of(5))
    values = generator.random((len(tags), 1))
    means = resampled_means(tags, np.hstack([values, 1.0 - 2.0 * values]), 100, generator)
    np.testing.assert_allclose(means[..., 1], 1.0 - 2.0 * means[..., 0])


def test_each_bound_covers_the_true_difference_as_often_as_it_says():
    generator, tags = np.random.default_rng(10), tags_of(prompts_of(20))
    beyond = np.zeros(2)
    for _ in range(500):
        ability = 0.8 * generator.beta(0.6, 0.4, size=(len(tags), 1))
        one, other = (generator.random((len(tags), 4)) < ability + gain for gain in (0.15, 0.0))
        gains = (one.mean(axis=1) - other.mean(axis=1))[:, None]
        means = resampled_means(tags, gains, 400, generator).mean(axis=1)[:, 0]
        bounds = interval(0.0, means, 0.05)
        beyond += [bounds.lower > 0.15, bounds.upper < 0.15]
    assert np.all(np.abs(beyond / 500 - 0.05) < 0.03)


def test_candidate_no_better_than_its_champion_is_seldom_promoted():
    generator, prompts = np.random.default_rng(11), prompts_of(12)
    passed = dict.fromkeys(GATES, 0)
    for _ in range(300):
        ability = abilities(generator, prompts)
        one, other = evidence(generator, prompts, ability), evidence(generator, prompts, ability)
        for gate in decide(one, other, num_resamples=500).gates:
            passed[gate.name] += gate.passed
    assert 0.02 < passed["overall"] / 300 < 0.05 + 0.035
    assert passed["tasks"] / 300 > 0.95 - 0.035
    assert 0.95 - 0.035 < passed["held_out"] / 300 < 0.98


@pytest.mark.parametrize("num_differing", [2, 4, 8])
def test_few_prompts_that_differ_by_chance_seldom_promote(num_differing):
    generator, tags = np.random.default_rng(12), tags_of(prompts_of(10))
    passed = 0
    for _ in range(300):
        differs = generator.random(len(tags)) < num_differing / len(tags)
        gains = np.where(differs, generator.choice([-0.25, 0.25], len(tags)), 0.0)
        passed += (
            interval(0.0, resampled_means(tags, gains[:, None], 400, generator).mean(axis=1)[:, 0], 0.05).lower > 0
        )
    assert passed / 300 < 0.05 + 0.035


def test_better_candidate_passes_every_gate():
    decision = decide(*better_pair())
    assert decision.promoted
    assert tuple(gate.name for gate in decision.gates) == GATES
    assert decision.failed == ()


def test_gain_within_the_error_fails_the_first_gate():
    candidate, champion = better_pair()
    barely = champion.correct_PG.copy()
    barely[np.flatnonzero(~barely[:, 0])[0], 0] = True
    decision = decide(dataclasses.replace(candidate, correct_PG=barely), champion)
    assert decision.candidate_score > decision.opponent_score
    assert decision.failed == ("overall",)


def test_gain_below_the_wanted_one_fails_the_first_gate():
    pair = better_pair()
    bounds = bounds_of(decide(*pair), "overall")
    assert decide(*pair, min_gain=bounds.lower).failed == ("overall",)
    assert decide(*pair, min_gain=bounds.lower - 1e-6).promoted


def test_one_task_lost_fails_the_second_gate_alone():
    candidate, champion = better_pair()
    correct, before = candidate.correct_PG.copy(), champion.correct_PG.copy()
    lost = np.array([prompt.tag == "position" for prompt in champion.prompts])
    correct[lost], before[lost] = False, True
    before[np.flatnonzero(lost)[:10], 1:] = False
    decision = decide(
        dataclasses.replace(candidate, correct_PG=correct), dataclasses.replace(champion, correct_PG=before)
    )
    tasks = decision.gates[1]
    assert [tag for tag in tasks.observed if not tasks.holds(tag)] == ["position"]
    assert "tasks" in decision.failed


def test_task_lost_by_one_image_passes_the_second_gate():
    candidate, champion = better_pair()
    correct, before = candidate.correct_PG.copy(), champion.correct_PG.copy()
    single = np.array([prompt.tag == "single_object" for prompt in champion.prompts])
    correct[single], before[single] = True, True
    correct[0, 0] = False
    decision = decide(
        dataclasses.replace(candidate, correct_PG=correct), dataclasses.replace(champion, correct_PG=before)
    )
    assert bounds_of(decision, "single_object").estimate < 0
    assert decision.promoted


def test_tasks_share_the_error_rate():
    candidate, champion = better_pair(30)
    gains = (candidate.correct_PG.mean(axis=1) - champion.correct_PG.mean(axis=1))[2 * 30 : 3 * 30]
    expected = gains.mean() + student.ppf(1.0 - 0.05 / 6, 29) * gains.std(ddof=1) / math.sqrt(30)
    bounds = bounds_of(decide(candidate, champion), "counting")
    assert bounds.upper == pytest.approx(expected, abs=0.1 * (expected - gains.mean()))


@pytest.mark.parametrize("degrees", [1, 11, 99])
def test_expanded_tail_begins_where_students_does(degrees):
    assert norm.ppf(expanded(0.01, degrees)) == pytest.approx(student.ppf(0.01, degrees))


def test_hacked_reward_fails_the_third_gate_alone():
    candidate, champion = better_pair()
    hacked = dataclasses.replace(candidate, held_out_PG=candidate.held_out_PG - 0.5)
    decision = decide(hacked, champion)
    assert decision.failed == ("held_out",)
    assert decision.training.lower > 0 > bounds_of(decision, "held_out").upper


def test_collapsed_diversity_fails_the_fourth_gate_alone():
    candidate, champion = better_pair()
    decision = decide(dataclasses.replace(candidate, diversity_P=0.78 * candidate.diversity_P), champion)
    assert decision.failed == ("diversity",)


def test_diversity_must_be_shown_to_be_kept():
    candidate, champion = better_pair()
    ratio = bounds_of(decide(candidate, champion), "diversity_ratio")
    needed = (ratio.estimate + ratio.lower) / 2
    assert decide(candidate, champion, min_diversity_ratio=needed).failed == ("diversity",)


def test_same_seed_gives_the_same_decision_and_another_nearly():
    pair = better_pair()
    assert decide(*pair) == decide(*pair)
    one, other = (bounds_of(decide(*pair, seed=seed), "overall") for seed in (0, 1))
    assert one != other
    assert one.lower == pytest.approx(other.lower, abs=0.15 * (one.upper - one.lower) / (2 * 1.645))


def test_order_of_the_prompts_changes_nothing_beyond_the_resampling_error():
    pair = better_pair({"single_object": 30, "colors": 12, "position": 25})
    order = np.random.default_rng(0).permutation(len(pair[0].prompts))
    shuffled = [
        ModelScores(
            prompts=[part.prompts[index] for index in order],
            noise_seed=part.noise_seed,
            **{
                name: getattr(part, name)[order] for name in ("correct_PG", "held_out_PG", "training_PG", "diversity_P")
            },
        )
        for part in pair
    ]
    before, after = decide(*pair).to_dict(), decide(*shuffled).to_dict()
    assert list(before) == list(after)
    for name in ("overall", "colors", "held_out", "diversity_ratio", "training"):
        lower, upper = before[f"promotion/{name}_lower"], before[f"promotion/{name}_upper"]
        assert after[f"promotion/{name}"] == pytest.approx(before[f"promotion/{name}"])
        assert after[f"promotion/{name}_lower"] == pytest.approx(lower, abs=0.1 * (upper - lower))
        assert after[f"promotion/{name}_upper"] == pytest.approx(upper, abs=0.1 * (upper - lower))


def test_overall_difference_is_that_of_genevals_scores():
    candidate, champion = better_pair({"single_object": 30, "colors": 12})
    decision = decide(candidate, champion)
    gain = bounds_of(decision, "overall").estimate
    assert gain == pytest.approx(decision.candidate_score - decision.opponent_score)
    by_hand = [
        (candidate.correct_PG[rows].mean() - champion.correct_PG[rows].mean()) for rows in np.split(range(42), [30])
    ]
    assert gain == pytest.approx(np.mean(by_hand))


def test_two_models_without_fault_are_equal():
    prompts = prompts_of(4)
    decision = decide(equal(prompts), equal(prompts))
    assert decision.failed == ("overall",)
    assert {(bounds.lower, bounds.upper) for bounds in decision.gates[1].observed.values()} == {(0.0, 0.0)}


def test_gain_without_spread_is_a_gain():
    prompts = prompts_of(4)
    decision = decide(equal(prompts), equal(prompts, correct=False))
    assert decision.promoted
    assert bounds_of(decision, "overall").lower == 1.0


def test_gain_of_just_the_wanted_size_is_not_above_it():
    nothing = equal(prompts_of(7), correct=False, group=10)
    gained = dataclasses.replace(nothing, correct_PG=np.tile(np.arange(10) < 3, (42, 1)))
    assert decide(gained, nothing, min_gain=0.3).failed == ("overall",)
    assert decide(gained, nothing, min_gain=0.3 - 1e-6).promoted


@pytest.mark.parametrize("rounding", [1e-17, -1e-17])
def test_rounding_is_neither_a_gain_nor_a_loss(rounding):
    bounds = interval(0.0, np.full(100, rounding), 0.05)
    assert (str(bounds.lower), str(bounds.upper)) == ("0.0", "0.0")


def test_one_prompt_of_a_task_never_promotes():
    prompts = prompts_of(1)
    decision = decide(equal(prompts), equal(prompts, correct=False))
    assert decision.failed == ("overall", "diversity")
    assert decision.to_dict()["promotion/overall"] == 1.0
    assert "promotion/overall_lower" not in decision.to_dict()
    assert "| Overall | +1.000 | ? to ? | lower bound above 0 | **failed** |" in decision.markdown()


def test_opponent_without_diversity_has_none_to_lose():
    prompts = prompts_of(4)
    copies = equal(prompts, correct=False, spread=0.0)
    assert bounds_of(decide(equal(prompts, spread=0.0), copies), "diversity_ratio").lower == 1.0
    assert decide(equal(prompts), copies).promoted
    assert "| Diversity, as a ratio | ? |" in decide(equal(prompts), copies).markdown()
    assert decide(copies, equal(prompts)).failed == ("overall", "tasks", "diversity")


def test_first_champion_is_compared_with_the_base_model():
    report = decide(*better_pair(), against="base model").markdown()
    assert "of the base model, better beyond chance" in report
    assert "It is the first champion." in report
    assert "| Candidate against base model |" in report
    assert "first champion" not in decide(*better_pair()).markdown()


def test_metrics_are_flat_and_finite():
    metrics = decide(*better_pair()).to_dict()
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["promotion/promoted"] == 1.0
    assert {f"promotion/gate/{name}" for name in GATES} <= set(metrics)
    assert {f"promotion/{name}_upper" for name in ("overall", *TAGS, "held_out", "diversity_ratio", "training")} <= set(
        metrics
    )


def test_report_says_why_a_candidate_was_refused():
    candidate, champion = better_pair()
    report = decide(dataclasses.replace(candidate, held_out_PG=candidate.held_out_PG - 0.5), champion).markdown()
    sentence, _, header, rule, *rows, _, note = report.splitlines()
    assert sentence.startswith("**Not promoted.** GenEval 0.")
    assert sentence.endswith("; a reward that it was not trained on is lower beyond its error.")
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert [row.split(" | ")[0].strip("| ") for row in rows[:7]] == [
        *("Overall", "Single", "Two", "Counting", "Colors", "Position", "Attr")
    ]
    assert sum("**failed**" in row for row in rows) == 1
    assert "120 prompts, 480 images of each model" in note


def test_diversity_is_the_mean_distance_of_the_pairs():
    images = np.zeros((2, 3, 2, 2, 3), dtype=np.uint8)
    images[1, 0] = 255
    np.testing.assert_allclose(diversity(images), [0.0, (1.0 + 1.0 + 0.0) / 3])


def test_diversity_takes_any_features():
    images = np.random.default_rng(0).integers(256, size=(3, 4, 5, 5, 3), dtype=np.uint8)
    brightness = images.mean(axis=(2, 3, 4))
    by_hand = np.abs(brightness[:, :, None] - brightness[:, None]).sum(axis=(1, 2)) / (4 * 3)
    features = diversity(images, lambda group: group.mean(axis=(1, 2, 3))[:, None])
    np.testing.assert_allclose(features, by_hand)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4, 3), (8, 4, 4, 3)])
def test_single_images_have_no_diversity(shape):
    with pytest.raises(ValueError, match="with two images or more of a prompt"):
        diversity(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct_PG": np.zeros((3, 2), dtype=bool)}, r"verdicts have shape \[3, 2\] for 4 prompts"),
        ({"correct_PG": np.zeros((4, 0), dtype=bool)}, "give a non-empty array"),
        ({"correct_PG": np.zeros((4, 2))}, "verdicts are of type float64; give booleans"),
        ({"held_out_PG": np.zeros(4)}, r"held-out reward has shape \[4\]; the verdicts ask for \[4, 2\]"),
        ({"training_PG": np.full((4, 2), np.nan)}, "training reward is not finite in 8 of 8 places"),
        ({"diversity_P": np.array([0.0, 1.0, np.inf, 1.0])}, "diversity is not finite in 1 of 4 places"),
        ({"diversity_P": np.array([0.0, 1.0, -0.5, 1.0])}, "diversity is -0.5 at its least"),
    ],
)
def test_evidence_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(equal(prompts_of({"colors": 4})), **changes)


@pytest.mark.parametrize(
    ("opponent", "message"),
    [
        (equal(prompts_of({"colors": 5})), r"the candidate has \[4, 2\] verdicts and its opponent \[5, 2\]"),
        (equal(prompts_of({"colors": 4}), group=3), "judge both on as many prompts and images"),
        (equal(prompts_of({"counting": 4})), r"prompt 0 is 'colors 0' \(colors\) for the candidate and 'counting 0'"),
        (equal(prompts_of({"colors": 4})[::-1]), "judge both on the same prompts in the same order"),
        (dataclasses.replace(equal(prompts_of({"colors": 4})), noise_seed=9), "noise seed 0 and its opponent from 9"),
    ],
)
def test_models_that_were_not_judged_alike_are_refused(opponent, message):
    with pytest.raises(ValueError, match=message):
        decide(equal(prompts_of({"colors": 4})), opponent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_rate": 0.0}, "error_rate is 0; it must be above 0 and below 0.5"),
        ({"error_rate": 0.5}, "error_rate is 0.5; it must be above 0"),
        ({"num_resamples": 100}, "num_resamples is 100, .* give at least 120"),
    ],
)
def test_settings_that_give_no_bound_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        decide(*better_pair(4), **settings)
