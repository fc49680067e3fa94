"""The prompt grammar and the prompt sets built on it, against GenEval's published files."""

from __future__ import annotations

import collections
import itertools
import json

import pytest

from sfgrpo.geneval import grammar
from sfgrpo.geneval.metadata import parse_prompt
from sfgrpo.geneval.prompt_sets import (
    largest_remainder,
    training_prompts,
    twin_key,
    validation_prompts,
)
from sfgrpo.types import TAGS, Prompt
from tests.support.paths import ROOT
from tests.support.reproductions import FLOW_GRPO_WEIGHTS, NUM_FLOW_GRPO_PROMPTS, evaluation_prompts

GENEVAL = ROOT / "data" / "geneval"
LINES = (GENEVAL / "evaluation_metadata.jsonl").read_text().splitlines()
CLASS_NAMES = (GENEVAL / "object_names.txt").read_text().splitlines()


NUM_VALIDATION = dict(zip(TAGS, (0, 100, 40, 100, 100, 100), strict=True))


def rebuilt(prompt: Prompt) -> Prompt:
    """Build a prompt again from its clauses alone."""
    first, last = prompt.include[0], prompt.include[-1]
    match prompt.tag:
        case "single_object":
            return grammar.single_object(first.class_name)
        case "two_object":
            return grammar.two_object(first.class_name, last.class_name)
        case "counting":
            return grammar.counting(first.class_name, first.count)
        case "colors":
            return grammar.colors(first.class_name, first.color)
        case "position":
            return grammar.position(last.class_name, first.class_name, last.position[0])
        case "color_attr":
            return grammar.color_attr(first.class_name, last.class_name, first.color, last.color)


def test_every_published_line_survives_reading_and_writing():
    assert [json.dumps(parse_prompt(line).to_metadata()) for line in LINES] == LINES


def test_every_published_prompt_is_built_again_from_its_clauses():
    prompts = [parse_prompt(line) for line in LINES]
    assert list(map(rebuilt, prompts)) == prompts
    assert len(prompts) == 553


@pytest.mark.parametrize(("name", "expected"), [("skis", "skises"), ("bus", "buses"), ("sheep", "sheeps")])
def test_plurals_are_the_benchmarks_own(name, expected):
    assert grammar.plural(name) == expected


def test_article_goes_by_the_first_letter():
    assert grammar.colors("dog", "orange").text == "a photo of an orange dog"
    assert grammar.single_object("umbrella").text == "a photo of an umbrella"


def test_evaluation_prompts_are_byte_identical_to_the_published_file():
    lines = "".join(f"{json.dumps(prompt.to_metadata())}\n" for prompt in evaluation_prompts(CLASS_NAMES))
    assert lines == (GENEVAL / "evaluation_metadata.jsonl").read_text()


def test_another_seed_gives_other_evaluation_prompts():
    prompts = evaluation_prompts(CLASS_NAMES, seed=44, num_draws=5)
    assert len(prompts) == 80 + 5 * 5
    assert prompts[:80] != evaluation_prompts(CLASS_NAMES, num_draws=5)[:80]


@pytest.fixture(scope="module")
def training() -> list[Prompt]:
    held_out = evaluation_prompts(CLASS_NAMES)
    return training_prompts(CLASS_NAMES, held_out, num_prompts=NUM_FLOW_GRPO_PROMPTS, weights=FLOW_GRPO_WEIGHTS, seed=0)


def test_training_prompts_have_flow_grpos_shares(training):
    shares = {"position": 20588, "counting": 14706, "color_attr": 8824, "colors": 2941, "two_object": 2941}
    assert collections.Counter(prompt.tag for prompt in training) == shares


def test_training_prompts_have_as_many_unique_texts_as_there_can_be(training):
    assert len({prompt.text for prompt in training}) == 20588 + 160 + 8824 + 696 + 2941


def test_training_prompts_hold_no_evaluation_prompt_nor_its_twin(training):
    keys = set(map(twin_key, evaluation_prompts(CLASS_NAMES)))
    assert not keys.intersection(map(twin_key, training))


def test_small_tasks_repeat_their_prompts_evenly(training):
    repeats = collections.Counter(prompt.text for prompt in training if prompt.tag == "counting")
    assert max(repeats.values()) - min(repeats.values()) == 1


def test_training_prompts_follow_their_seed():
    draws = [
        training_prompts(CLASS_NAMES, (), num_prompts=20, weights=FLOW_GRPO_WEIGHTS, seed=seed) for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_task_held_out_in_full_is_refused():
    everything = [grammar.counting(name, count) for name, count in itertools.product(CLASS_NAMES, (2, 3, 4))]
    with pytest.raises(ValueError, match="all prompts of task counting are held out"):
        training_prompts(CLASS_NAMES, everything, num_prompts=100, weights=FLOW_GRPO_WEIGHTS, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_validation_prompts_ask_each_for_something_of_their_own(seed):
    asked = evaluation_prompts(CLASS_NAMES)
    drawn = validation_prompts(CLASS_NAMES, asked, num_prompts=NUM_VALIDATION, seed=seed)
    assert collections.Counter(prompt.tag for prompt in drawn) == {tag: n for tag, n in NUM_VALIDATION.items() if n}
    keys = set(map(twin_key, drawn))
    assert len(keys) == len(drawn)
    assert keys.isdisjoint(map(twin_key, asked))
    held_out = [*asked, *drawn]
    trained = training_prompts(CLASS_NAMES, held_out, num_prompts=2000, weights=FLOW_GRPO_WEIGHTS, seed=seed)
    assert keys.isdisjoint(map(twin_key, trained))


def test_validation_prompts_of_geneval_follow_their_seed():
    few = dict.fromkeys(TAGS, 5)
    draws = [validation_prompts(CLASS_NAMES, (), num_prompts=few, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(("tag", "left"), [("single_object", 0), ("counting", 160)])
def test_more_validation_prompts_than_geneval_leaves_are_refused(tag, left):
    wanted = NUM_VALIDATION | {tag: left + 1}
    told = f"task {tag} has {left} prompts that are not evaluated on, fewer than the {left + 1} for validation"
    with pytest.raises(ValueError, match=told):
        validation_prompts(CLASS_NAMES, evaluation_prompts(CLASS_NAMES), num_prompts=wanted, seed=0)


def test_twins_share_a_key_only_where_order_means_nothing():
    assert twin_key(grammar.two_object("dog", "cat")) == twin_key(grammar.two_object("cat", "dog"))
    assert twin_key(grammar.position("dog", "cat", "above")) != twin_key(grammar.position("cat", "dog", "above"))
    swapped = grammar.color_attr("cat", "dog", "blue", "red")
    assert twin_key(grammar.color_attr("dog", "cat", "red", "blue")) == twin_key(swapped)
    assert twin_key(grammar.color_attr("dog", "cat", "blue", "red")) != twin_key(swapped)


def test_shares_add_up_and_are_within_one_of_exact():
    shares = largest_remainder(FLOW_GRPO_WEIGHTS, 1000)
    assert sum(shares.values()) == 1000
    assert all(abs(shares[tag] - 1000 * FLOW_GRPO_WEIGHTS[tag] / 17) < 1 for tag in TAGS)
