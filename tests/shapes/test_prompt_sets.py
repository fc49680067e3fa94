"""The prompts of the shapes world and their split."""

from __future__ import annotations

import collections

import pytest

from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.shapes.prompt_sets import all_prompts, sample_training_prompts, split_prompts, split_validation
from sfgrpo.types import TAGS

NUM_VALIDATION = dict(zip(TAGS, (0, 6, 4, 12, 32, 64), strict=True))
NUM_EVALUATION = dict(zip(TAGS, (6, 8, 6, 12, 24, 24), strict=True))
WEIGHTS = dict(zip(TAGS, (0.0, 1.0, 5.0, 1.0, 7.0, 3.0), strict=True))


def test_prompt_space_has_the_stated_size_and_no_duplicates():
    space = all_prompts()
    assert [len(space[tag]) for tag in TAGS] == [6, 30, 18, 48, 120, 1680]
    assert len({prompt.text for prompts in space.values() for prompt in prompts}) == 6 + 30 + 18 + 48 + 120 + 1680


def test_split_shares_no_prompt_and_no_order_swapped_twin():
    others, evaluation = split_prompts(NUM_EVALUATION, seed=0)
    for tag in TAGS:
        assert not set(map(twin_key, others[tag])) & set(map(twin_key, evaluation[tag]))
        assert len(evaluation[tag]) == NUM_EVALUATION[tag]


def test_split_leaves_out_only_evaluation_prompts_and_their_twins():
    others, evaluation = split_prompts(NUM_EVALUATION, seed=0)
    for tag, space in all_prompts().items():
        held_out = set(map(twin_key, evaluation[tag]))
        assert [prompt for prompt in space if twin_key(prompt) not in held_out] == others[tag]


def test_split_follows_its_seed():
    assert split_prompts(NUM_EVALUATION, seed=0) == split_prompts(NUM_EVALUATION, seed=0)
    assert split_prompts(NUM_EVALUATION, seed=0) != split_prompts(NUM_EVALUATION, seed=1)


def test_more_evaluation_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="task counting has 18 prompts, fewer than the 19 for evaluation; lower it"):
        split_prompts(NUM_EVALUATION | {"counting": 19}, seed=0)


@pytest.mark.parametrize("seed", range(20))
def test_validation_shares_no_request_with_training_or_evaluation(seed):
    others, evaluation = split_prompts(NUM_EVALUATION, seed)
    training, validation = split_validation(others, NUM_VALIDATION, seed)
    for tag, space in all_prompts().items():
        trained, selecting, asked = (set(map(twin_key, sets[tag])) for sets in (training, validation, evaluation))
        assert not (trained & selecting or trained & asked or selecting & asked)
        assert len(validation[tag]) == len({prompt.text for prompt in validation[tag]}) == NUM_VALIDATION[tag]
        assert training[tag] == [prompt for prompt in space if twin_key(prompt) not in selecting | asked]
        assert training[tag] or tag == "single_object"


def test_validation_takes_all_twins_of_a_request_before_the_next():
    others, _ = split_prompts(NUM_EVALUATION, seed=0)
    _, validation = split_validation(others, NUM_VALIDATION | {"two_object": 7}, seed=0)
    keys = [twin_key(prompt) for prompt in validation["two_object"]]
    assert len(keys) == 7 and len(set(keys)) == 4 and [keys.count(key) for key in dict.fromkeys(keys)] == [2, 2, 2, 1]


def test_validation_follows_its_seed():
    others, _ = split_prompts(NUM_EVALUATION, seed=0)
    drawn = [split_validation(others, NUM_VALIDATION, seed)[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_validation_prompts_than_are_left_are_refused():
    others, _ = split_prompts(NUM_EVALUATION, seed=0)
    told = "task counting has 12 prompts that are not evaluated on, fewer than the 13 for validation; lower it"
    with pytest.raises(ValueError, match=told):
        split_validation(others, NUM_VALIDATION | {"counting": 13}, seed=0)


def test_training_prompts_have_the_weights_ratio_and_use_pools_evenly():
    training, _ = split_validation(split_prompts(NUM_EVALUATION, seed=0)[0], NUM_VALIDATION, seed=0)
    drawn = sample_training_prompts(training, WEIGHTS, 1700, seed=0)
    assert collections.Counter(prompt.tag for prompt in drawn) == {
        tag: 100 * weight for tag, weight in WEIGHTS.items() if weight
    }
    repeats = collections.Counter(prompt.text for prompt in drawn if prompt.tag == "counting")
    assert max(repeats.values()) - min(repeats.values()) <= 1


def test_training_prompts_follow_their_seed():
    training, _ = split_validation(split_prompts(NUM_EVALUATION, seed=0)[0], NUM_VALIDATION, seed=0)
    draws = [sample_training_prompts(training, WEIGHTS, 50, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_weight_without_prompts_left_is_refused():
    training, _ = split_validation(split_prompts(NUM_EVALUATION, seed=0)[0], NUM_VALIDATION, seed=0)
    with pytest.raises(ValueError, match="all prompts of task single_object are held out for evaluation"):
        sample_training_prompts(training, WEIGHTS | {"single_object": 1.0}, 50, seed=0)
