"""The bootstrap against scipy and against repeated evaluations, and every gate against a planted failure."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm
from scipy.stats import t as student

from sfgrpo.config.schema import PromotionConfig, RewardConfig
from sfgrpo.evaluation.agreement import Agreement
from sfgrpo.geneval.grammar import counting, two_object
from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.promotion.binomial import share_interval
from sfgrpo.promotion.bootstrap import expanded, interval, resampled_means, task_means
from sfgrpo.promotion.diversity import diversity
from sfgrpo.promotion.gates import Comparison, ModelScores, agreement_gate, compare_scores
from sfgrpo.promotion.report import agreement_note, decision_sentence, gates_table
from sfgrpo.types import TAGS, Clause, Prompt, Tag

GATES = ("overall", "tasks", "held_out", "diversity")
CONFIG = PromotionConfig(
    held_out=RewardConfig(name="likeness"),
    seed=0,
    min_gain=0.0,
    min_diversity_ratio=0.8,
    min_agreement=0.85,
    agreement_images=24,
    error_rate=0.05,
    num_resamples=10_000,
)


def prompts_of(per_task: int | dict[str, int]) -> list[Prompt]:
    counts = per_task if isinstance(per_task, dict) else dict.fromkeys(TAGS, per_task)
    return [prompt_of(tag, index) for tag, count in counts.items() for index in range(count)]


def prompt_of(tag: Tag, index: int) -> Prompt:
    """Return a prompt that asks for something else than one of another number."""
    return Prompt(text=f"{tag} {index}", tag=tag, include=(Clause(class_name=f"{tag} {index}", count=1),))


def tags_of(prompts):
    return [prompt.tag for prompt in prompts]


def scores(generator, prompts, ability_P, *, group=4, reward=0.0, diversity=1.0) -> ModelScores:
    """Draw scores of a model that solves prompt p with probability `ability_P[p]`."""
    shape = (len(prompts), group)
    return ModelScores(
        correct_PG=generator.random(shape) < np.reshape(ability_P, (-1, 1)),
        held_out_PG=generator.normal(reward, 0.5, shape),
        training_PG=generator.normal(reward, 0.5, shape).astype(np.float32),
        diversity_P=diversity * generator.uniform(0.1, 0.3, len(prompts)),
    )


def abilities(generator, prompts):
    return generator.beta(0.6, 0.4, size=len(prompts))


def equal(prompts, *, correct=True, group=2, diversity=0.2) -> ModelScores:
    """Return scores in which all prompts and images are alike."""
    shape = (len(prompts), group)
    return ModelScores(
        correct_PG=np.full(shape, correct),
        held_out_PG=np.zeros(shape),
        training_PG=np.zeros(shape),
        diversity_P=np.full(len(prompts), diversity),
    )


@dataclasses.dataclass(frozen=True)
class Pair:
    """A candidate and its champion, which drew the same prompts."""

    prompts: list[Prompt]
    candidate: ModelScores
    champion: ModelScores

    def compare(self, **settings) -> Comparison:
        return compare_scores(self.prompts, self.candidate, self.champion, dataclasses.replace(CONFIG, **settings))

    def change(self, **candidate) -> Pair:
        return dataclasses.replace(self, candidate=dataclasses.replace(self.candidate, **candidate))

    def change_champion(self, **champion) -> Pair:
        return dataclasses.replace(self, champion=dataclasses.replace(self.champion, **champion))


def better_pair(per_task: int | dict[str, int] = 20) -> Pair:
    """Return a candidate that passes every gate, and its champion."""
    generator, prompts = np.random.default_rng(0), prompts_of(per_task)
    ability = 0.7 * abilities(generator, prompts)
    candidate = scores(generator, prompts, ability + 0.3, reward=0.2)
    return Pair(prompts, candidate, scores(generator, prompts, ability))


def bounds_of(comparison: Comparison, metric: str):
    return next(gate.observed[metric] for gate in comparison.gates if metric in gate.observed)


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
    one, other = (scores(generator, prompts, np.full(200, 0.5), diversity=diversity) for diversity in (0.9, 1.0))
    found = bounds_of(Pair(prompts, one, other).compare(), "diversity_ratio")
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


def test_metrics_of_a_prompt_are_drawn_together():
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
        pair = Pair(prompts, scores(generator, prompts, ability), scores(generator, prompts, ability))
        for gate in pair.compare(num_resamples=500).gates:
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
    comparison = better_pair().compare()
    assert tuple(gate.name for gate in comparison.gates) == GATES
    assert comparison.failed == ()


def test_gain_within_the_error_fails_the_first_gate():
    pair = better_pair()
    barely = pair.champion.correct_PG.copy()
    barely[np.flatnonzero(~barely[:, 0])[0], 0] = True
    comparison = pair.change(correct_PG=barely).compare()
    assert comparison.candidate_score > comparison.baseline_score
    assert comparison.failed == ("overall",)


def test_gain_below_the_required_one_fails_the_first_gate():
    pair = better_pair()
    bounds = bounds_of(pair.compare(), "overall")
    assert pair.compare(min_gain=bounds.lower).failed == ("overall",)
    assert pair.compare(min_gain=bounds.lower - 1e-6).failed == ()


def test_one_task_lost_fails_the_second_gate_alone():
    pair = better_pair()
    correct, before = pair.candidate.correct_PG.copy(), pair.champion.correct_PG.copy()
    lost = np.array([prompt.tag == "position" for prompt in pair.prompts])
    correct[lost], before[lost] = False, True
    before[np.flatnonzero(lost)[:10], 1:] = False
    comparison = pair.change(correct_PG=correct).change_champion(correct_PG=before).compare()
    tasks = comparison.gates[1]
    assert [tag for tag in tasks.observed if not tasks.holds(tag)] == ["position"]
    assert "tasks" in comparison.failed


def test_task_lost_by_one_image_passes_the_second_gate():
    pair = better_pair()
    correct, before = pair.candidate.correct_PG.copy(), pair.champion.correct_PG.copy()
    single = np.array([prompt.tag == "single_object" for prompt in pair.prompts])
    correct[single], before[single] = True, True
    correct[0, 0] = False
    comparison = pair.change(correct_PG=correct).change_champion(correct_PG=before).compare()
    assert bounds_of(comparison, "single_object").estimate < 0
    assert comparison.failed == ()


def test_tasks_share_the_error_rate():
    pair = better_pair(30)
    gains = (pair.candidate.correct_PG.mean(axis=1) - pair.champion.correct_PG.mean(axis=1))[2 * 30 : 3 * 30]
    expected = gains.mean() + student.ppf(1.0 - 0.05 / 6, 29) * gains.std(ddof=1) / math.sqrt(30)
    bounds = bounds_of(pair.compare(), "counting")
    assert bounds.upper == pytest.approx(expected, abs=0.1 * (expected - gains.mean()))


@pytest.mark.parametrize("degrees", [1, 11, 99])
def test_expanded_tail_begins_where_students_does(degrees):
    assert norm.ppf(expanded(0.01, degrees)) == pytest.approx(student.ppf(0.01, degrees))


def test_hacked_reward_fails_the_third_gate_alone():
    pair = better_pair()
    comparison = pair.change(held_out_PG=pair.candidate.held_out_PG - 0.5).compare()
    assert comparison.failed == ("held_out",)
    assert comparison.training.lower > 0 > bounds_of(comparison, "held_out").upper


def test_collapsed_diversity_fails_the_fourth_gate_alone():
    pair = better_pair()
    assert pair.change(diversity_P=0.78 * pair.candidate.diversity_P).compare().failed == ("diversity",)


def agreement(num_confirmed: int, num_correct: int, num_images: int = 144) -> Agreement:
    """Return the agreement on the images of one prompt that asks for a number."""
    ranks = np.arange(num_images)[None]
    return Agreement.of([counting("ring", 2)], ranks < num_correct, ranks < num_confirmed)


def agreeing(candidate: Agreement | None, baseline: Agreement | None) -> Comparison:
    return better_pair().change(agreement=candidate).change_champion(agreement=baseline).compare()


def test_hidden_objects_fail_the_fifth_gate_alone():
    comparison = agreeing(agreement(39, 63), agreement(18, 20))
    assert comparison.failed == ("agreement",)
    assert tuple(gate.name for gate in comparison.gates) == (*GATES, "agreement")
    metrics = comparison.to_dict()
    assert metrics["promotion/agreement"] == pytest.approx(39 / 63)
    assert (metrics["promotion/baseline_agreement"], metrics["promotion/gate/agreement"]) == (0.9, 0.0)


def test_some_disputed_images_fail_no_gate():
    assert agreeing(agreement(60, 63), agreement(20, 20)).failed == ()
    assert agreeing(agreement(51, 63), agreement(20, 20)).failed == ()


def test_few_correct_images_cannot_refuse_a_candidate():
    comparison = agreeing(agreement(2, 4), agreement(20, 20))
    assert comparison.failed == ()
    none = agreeing(agreement(0, 0), agreement(0, 0))
    assert none.failed == () and "promotion/agreement" not in none.to_dict()
    assert "| Agreement (share) | ? | 0.000 to 1.000 | upper bound at least 0.85 | passed |" in gates_table(
        none, "champion"
    )


def test_candidate_need_not_agree_more_than_its_baseline():
    assert agreeing(agreement(39, 63), agreement(60, 100)).failed == ()
    assert agreeing(agreement(20, 63), agreement(60, 100)).failed == ("agreement",)


def test_few_images_of_the_baseline_excuse_nothing():
    assert agreeing(agreement(39, 63), agreement(2, 4)).failed == ("agreement",)


def test_flattered_detector_is_found_out_and_an_honest_policy_passes():
    """Policies with the rates of the two adapters that were measured: 4 of 10 images correct, of a base with 1 of 7."""
    generator, refused = np.random.default_rng(13), {"flattering": 0, "honest": 0}
    for _ in range(200):
        for name, share in (("flattering", 0.62), ("honest", 0.93)):
            correct, base = generator.binomial(144, 0.43), generator.binomial(144, 0.14)
            ours = agreement(generator.binomial(correct, share), correct)
            (gate,) = agreement_gate(ours, agreement(generator.binomial(base, 0.93), base), CONFIG)
            refused[name] += not gate.passed
    assert refused["flattering"] / 200 > 0.95
    assert refused["honest"] / 200 < 0.02


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (39, 63)])
def test_bounds_of_a_share_are_scipys(successes, trials):
    bounds = share_interval(successes, trials, 0.05)
    theirs = binomtest(successes, trials).proportion_ci(confidence_level=0.9, method="exact")
    assert bounds.estimate == successes / trials
    assert (bounds.lower, bounds.upper) == pytest.approx((theirs.low, theirs.high))


def test_report_says_where_no_counter_confirms_the_verdicts():
    without = agreement_note(better_pair().compare(), CONFIG)
    assert "Agreement was not tested: this detector has no independent counter" in without
    assert "of the baseline's it confirms 0.900." in agreement_note(
        agreeing(agreement(60, 63), agreement(18, 20)), CONFIG
    )
    assert "none, since none is correct." in agreement_note(agreeing(agreement(60, 63), agreement(0, 0)), CONFIG)


def test_diversity_must_be_shown_to_be_kept():
    pair = better_pair()
    ratio = bounds_of(pair.compare(), "diversity_ratio")
    assert pair.compare(min_diversity_ratio=(ratio.estimate + ratio.lower) / 2).failed == ("diversity",)


def test_same_seed_gives_the_same_decision_and_another_nearly():
    pair = better_pair()
    assert pair.compare() == pair.compare()
    one, other = (bounds_of(pair.compare(seed=seed), "overall") for seed in (0, 1))
    assert one != other
    assert one.lower == pytest.approx(other.lower, abs=0.15 * (one.upper - one.lower) / (2 * 1.645))


def test_order_of_the_prompts_changes_nothing_beyond_the_resampling_error():
    pair = better_pair({"single_object": 30, "colors": 12, "position": 25})
    order = np.random.default_rng(0).permutation(len(pair.prompts))
    names = ("correct_PG", "held_out_PG", "training_PG", "diversity_P")
    candidate, champion = (
        ModelScores(**{name: getattr(part, name)[order] for name in names}) for part in (pair.candidate, pair.champion)
    )
    shuffled = Pair([pair.prompts[index] for index in order], candidate, champion)
    before, after = pair.compare().to_dict(), shuffled.compare().to_dict()
    assert list(before) == list(after)
    for name in ("overall", "colors", "held_out", "diversity_ratio", "training"):
        lower, upper = before[f"promotion/{name}_lower"], before[f"promotion/{name}_upper"]
        assert after[f"promotion/{name}"] == pytest.approx(before[f"promotion/{name}"])
        assert after[f"promotion/{name}_lower"] == pytest.approx(lower, abs=0.1 * (upper - lower))
        assert after[f"promotion/{name}_upper"] == pytest.approx(upper, abs=0.1 * (upper - lower))


def test_overall_difference_is_that_of_genevals_scores():
    pair = better_pair({"single_object": 30, "colors": 12})
    comparison = pair.compare()
    gain = bounds_of(comparison, "overall").estimate
    assert gain == pytest.approx(comparison.candidate_score - comparison.baseline_score)
    by_hand = [
        pair.candidate.correct_PG[rows].mean() - pair.champion.correct_PG[rows].mean()
        for rows in np.split(range(42), [30])
    ]
    assert gain == pytest.approx(np.mean(by_hand))


def test_two_models_without_fault_are_equal():
    prompts = prompts_of(4)
    comparison = Pair(prompts, equal(prompts), equal(prompts)).compare()
    assert comparison.failed == ("overall",)
    assert {(bounds.lower, bounds.upper) for bounds in comparison.gates[1].observed.values()} == {(0.0, 0.0)}


def test_gain_without_variance_is_a_gain():
    prompts = prompts_of(4)
    comparison = Pair(prompts, equal(prompts), equal(prompts, correct=False)).compare()
    assert comparison.failed == ()
    assert bounds_of(comparison, "overall").lower == 1.0


def test_gain_of_just_the_required_size_is_not_above_it():
    prompts = prompts_of(7)
    nothing = equal(prompts, correct=False, group=10)
    pair = Pair(prompts, nothing, nothing).change(correct_PG=np.tile(np.arange(10) < 3, (42, 1)))
    assert pair.compare(min_gain=0.3).failed == ("overall",)
    assert pair.compare(min_gain=0.3 - 1e-6).failed == ()


@pytest.mark.parametrize("rounding", [1e-17, -1e-17])
def test_rounding_is_neither_a_gain_nor_a_loss(rounding):
    bounds = interval(0.0, np.full(100, rounding), 0.05)
    assert (str(bounds.lower), str(bounds.upper)) == ("0.0", "0.0")


def test_one_prompt_of_a_task_never_promotes():
    prompts = prompts_of(1)
    comparison = Pair(prompts, equal(prompts), equal(prompts, correct=False)).compare()
    assert comparison.failed == ("overall", "diversity")
    assert comparison.to_dict()["promotion/overall"] == 1.0
    assert "promotion/overall_lower" not in comparison.to_dict()
    assert "| Overall | +1.000 | ? to ? | lower bound above 0 | **failed** |" in gates_table(comparison, "champion")


def test_baseline_without_diversity_has_none_to_lose():
    prompts = prompts_of(4)
    copies = equal(prompts, correct=False, diversity=0.0)
    still = Pair(prompts, equal(prompts, diversity=0.0), copies).compare()
    assert bounds_of(still, "diversity_ratio").lower == 1.0
    gained = Pair(prompts, equal(prompts), copies).compare()
    assert gained.failed == ()
    assert "| Diversity (ratio) | ? |" in gates_table(gained, "champion")
    assert Pair(prompts, copies, equal(prompts)).compare().failed == ("overall", "tasks", "diversity")


def test_first_champion_is_compared_with_the_base_model():
    comparison = better_pair().compare()
    sentence = decision_sentence(comparison, "base model")
    assert "and the base model 0." in sentence
    assert sentence.endswith("It is the first champion.")
    assert "| Candidate against base model |" in gates_table(comparison, "base model")
    assert "first champion" not in decision_sentence(comparison, "champion")


def test_metrics_are_flat_and_finite():
    metrics = better_pair().compare().to_dict()
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["promotion/promoted"] == 1.0
    assert {f"promotion/gate/{name}" for name in GATES} <= set(metrics)
    assert {f"promotion/{name}_upper" for name in ("overall", *TAGS, "held_out", "diversity_ratio", "training")} <= set(
        metrics
    )


def test_report_says_why_a_candidate_was_refused():
    pair = better_pair()
    comparison = pair.change(held_out_PG=pair.candidate.held_out_PG - 0.5).compare()
    sentence = decision_sentence(comparison, "champion")
    assert sentence.startswith("**Not promoted.** On GenEval the candidate scores 0.")
    assert sentence.endswith(", but a reward that it was not trained on is lower, beyond chance.")
    header, rule, *rows = gates_table(comparison, "champion").splitlines()
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert [row.split(" | ")[0].strip("| ") for row in rows[:7]] == [
        *("Overall", "Single", "Two", "Counting", "Colors", "Position", "Attr")
    ]
    assert sum("**failed**" in row for row in rows) == 1


def test_diversity_is_the_mean_distance_of_the_pairs():
    images = np.zeros((2, 3, 2, 2, 3), dtype=np.uint8)
    images[1, 0] = 255
    np.testing.assert_allclose(diversity(images), [0.0, (1.0 + 1.0 + 0.0) / 3])


@pytest.mark.parametrize("shape", [(2, 1, 4, 4, 3), (8, 4, 4, 3)])
def test_single_images_have_no_diversity(shape):
    with pytest.raises(ValueError, match="with two images or more of a prompt"):
        diversity(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"correct_PG": np.zeros((3, 2), dtype=bool)},
            r"held-out reward has shape \[4, 2\]; the verdicts need \[3, 2\]",
        ),
        ({"correct_PG": np.zeros((4, 0), dtype=bool)}, "give a non-empty array"),
        ({"held_out_PG": np.zeros(4)}, r"held-out reward has shape \[4\]; the verdicts need \[4, 2\]"),
        ({"training_PG": np.full((4, 2), np.nan)}, "training reward is not finite in 8 of 8 places"),
        ({"diversity_P": np.array([0.0, 1.0, np.inf, 1.0])}, "diversity is not finite in 1 of 4 places"),
    ],
)
def test_impossible_scores_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(equal(prompts_of({"colors": 4})), **changes)


@pytest.mark.parametrize(("num_prompts", "baseline"), [(4, {"colors": 5}), (5, {"colors": 4})])
def test_models_with_other_numbers_of_prompts_are_refused(num_prompts, baseline):
    prompts = prompts_of({"colors": num_prompts})
    with pytest.raises(ValueError, match=r"score both on the same prompts with as many images"):
        Pair(prompts, equal(prompts_of({"colors": 4})), equal(prompts_of(baseline))).compare()


def test_models_with_other_numbers_of_images_are_refused():
    prompts = prompts_of({"colors": 4})
    with pytest.raises(
        ValueError, match=r"the candidate has \[4, 2\] verdicts and its baseline \[4, 3\] for 4 prompts"
    ):
        Pair(prompts, equal(prompts), equal(prompts, group=3)).compare()


def repeated_pair(generator, sizes, *, spread=0.6) -> Pair:
    """Return two models of equal quality on two tasks whose requests stand in the set as often as `sizes` says.

    Of each request one of the models is better at random, in all of its prompts alike.
    """
    tags: tuple[Tag, Tag] = ("counting", "colors")
    prompts = [
        dataclasses.replace(prompt_of(tag, request), text=f"{tag} {request} {copy}")
        for tag in tags
        for request, size in enumerate(sizes)
        for copy in range(size)
    ]
    shift = np.concatenate([np.repeat(generator.normal(0.0, spread, len(sizes)), sizes) for _ in tags])
    ability = np.full(len(prompts), 0.5)
    candidate, champion = ability + shift / 2, ability - shift / 2
    return Pair(prompts, scores(generator, prompts, candidate), scores(generator, prompts, champion))


def share_promoted(pairs, **settings) -> float:
    """Return the share of candidates that pass the gate on the overall score."""
    return float(np.mean(["overall" not in pair.compare(num_resamples=400, **settings).failed for pair in pairs]))


@pytest.mark.parametrize(
    "sizes",
    [(1,) * 15, (6,) * 15, (1, 2, 3, 4, 5) * 3, (1,) * 10 + (8,) * 5],
    ids=["once each", "six times each", "one to five times", "some eight times"],
)
def test_repeated_requests_let_no_more_equal_candidates_through(sizes):
    generator = np.random.default_rng(0)
    pairs = [repeated_pair(generator, sizes) for _ in range(400)]
    # A rate of .05 has a standard error of .011.
    assert share_promoted(pairs) <= 0.05 + 3 * 0.011


def test_repeats_taken_for_independent_would_let_equal_candidates_through():
    generator = np.random.default_rng(0)
    pairs = [repeated_pair(generator, (6,) * 15) for _ in range(400)]
    alone = [
        dataclasses.replace(pair, prompts=[prompt_of(p.tag, index) for index, p in enumerate(pair.prompts)])
        for pair in pairs
    ]
    assert share_promoted(alone) > 0.15


def test_a_request_in_two_orders_is_one_cluster():
    prompts = [two_object("dog", "cat"), two_object("cat", "dog"), two_object("cow", "cat")]
    values_PJ = np.array([[1.0], [3.0], [7.0]])
    means = resampled_means(tags_of(prompts), values_PJ, 50, np.random.default_rng(0), [*map(twin_key, prompts)])
    assert set(means.ravel()) == {2.0, 7.0}


def test_requests_that_differ_change_no_number():
    generator, prompts = np.random.default_rng(1), prompts_of(7)
    values_PJ = generator.random((len(prompts), 3))
    drawn = [
        resampled_means(tags_of(prompts), values_PJ, 20, np.random.default_rng(2), requests)
        for requests in (None, [*map(twin_key, prompts)])
    ]
    np.testing.assert_array_equal(*drawn)


def test_one_request_in_many_wordings_has_an_unknown_error():
    pair = better_pair({"colors": 30})
    same = [dataclasses.replace(prompt, include=pair.prompts[0].include) for prompt in pair.prompts]
    comparison = dataclasses.replace(pair, prompts=same).compare()
    assert bounds_of(comparison, "overall").lower == -math.inf
    assert "overall" in comparison.failed
