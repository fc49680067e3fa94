"""Prompt sets that could not be drawn, judged or counted as they stand are refused with file and line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sfgrpo.config.stages import PromptsStage, load_config
from sfgrpo.errors import ConfigError
from sfgrpo.factory import make_text_encoders
from sfgrpo.geneval.grammar import color_attr, colors, counting, position, single_object, two_object
from sfgrpo.policies.text_encoders import TextEncoder
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import PromptFile, make_prompts
from sfgrpo.rewards import build_reward
from sfgrpo.types import Clause, Prompt
from tests.support.paths import ROOT

BASE = str(ROOT / "models/shapes-base")
RING, HEART = single_object("ring"), single_object("heart")


@pytest.fixture(scope="module")
def clips() -> tuple[TextEncoder, ...]:
    """The text encoders of the shipped base model, which take 12 tokens."""
    return make_text_encoders(BASE, None, 0)


def file_of(*prompts: Prompt, name: str = "evaluation.jsonl") -> PromptFile:
    """Return a file in which every second line is blank."""
    return PromptFile(path=Path(name), prompts=prompts, lines=range(1, 2 * len(prompts), 2))


def reworded(prompt: Prompt, text: str) -> Prompt:
    return dataclasses.replace(prompt, text=text)


def refused(match: str, *args, **kwargs) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        check_prompts(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("params", ["params.yaml", "params/sd35_medium.yaml"])
def test_shipped_sets_pass(params, clips, monkeypatch):
    monkeypatch.chdir(ROOT)
    split = make_prompts(load_config(PromptsStage, Path(params)))
    shapes = params == "params.yaml"
    judges = [build_reward(name) for name in ("geneval", "geneval_correct", "likeness")] if shapes else []
    check_prompts(
        file_of(*split.evaluation),
        judges,
        validation=file_of(*split.validation),
        training=file_of(*split.training),
        rewards=judges,
        encoders=clips if shapes else (),
    )


@pytest.mark.parametrize("edition", [1, 2])
def test_every_edition_and_seed_of_the_shapes_passes(edition, clips):
    config = load_config(PromptsStage, ROOT / "params.yaml")
    config = dataclasses.replace(config, seed=edition, prompts=dataclasses.replace(config.prompts, edition=edition))
    split = make_prompts(config)
    check_prompts(
        file_of(*split.evaluation),
        (),
        validation=file_of(*split.validation),
        training=file_of(*split.training),
        encoders=clips,
    )


LONG = "a photo of a purple ring and a yellow heart in snow"


def test_a_prompt_that_no_encoder_reads_to_its_end_is_refused(clips):
    told = refused(
        r"^evaluation.jsonl:3: no text encoder of the base model reads the whole of",
        file_of(HEART, reworded(RING, LONG)),
        (),
        encoders=clips,
    )
    number = len(clips[0].tokenize([LONG])[0]) + 2
    assert json.dumps(LONG) in told
    assert f"(tokenizer takes 12 tokens of {number}, tokenizer_2 takes 12 tokens of {number})" in told
    assert told.endswith("shorten or reword it")


@pytest.mark.parametrize("length", [9, 10, 11])
def test_the_limit_is_met_to_the_token(clips, length):
    prompt = reworded(RING, " ".join(["ring"] * length))
    if length <= 10:
        check_prompts(file_of(prompt), (), encoders=clips)
    else:
        refused("takes 12 tokens of 13", file_of(prompt), (), encoders=clips)


def test_training_prompts_are_measured_too(clips):
    refused(
        r"^train.jsonl:1: no text encoder",
        file_of(HEART),
        (),
        training=file_of(reworded(RING, LONG), name="train.jsonl"),
        encoders=clips,
    )


@pytest.mark.parametrize(
    "text", ["a ring!", "a <|endoftext|> ring", "a r\u00efng", "\u2764 ring", "a ring\u200b <|startoftext|>"]
)
def test_a_part_without_tokens_is_refused(clips, text):
    refused("has no tokens for a part of it", file_of(reworded(RING, text)), (), encoders=clips)


def test_one_encoder_that_reads_it_whole_is_enough(clips):
    longer = dataclasses.replace(clips[0], name="tokenizer_3", max_tokens=256)
    check_prompts(file_of(reworded(RING, LONG)), (), encoders=(*clips, longer))
    # Both were one prompt to the short ones; the long one tells them apart.
    pair = reworded(RING, f"{LONG} and a ring"), reworded(HEART, f"{LONG} and a heart")
    check_prompts(file_of(*pair), (), encoders=(*clips, longer))
    refused("tokenizer_3 takes 256 tokens of", file_of(reworded(RING, "ring " * 255)), (), encoders=(*clips, longer))


def test_the_t5_encoder_counts_where_it_is_used():
    encoders = make_text_encoders(BASE, None, 64)
    assert [(encoder.name, encoder.max_tokens) for encoder in encoders] == [
        ("tokenizer", 12),
        ("tokenizer_2", 12),
        ("tokenizer_3", 64),
    ]
    # That of the shapes is a stand-in without a vocabulary.
    told = refused("no text encoder", file_of(reworded(RING, LONG)), (), encoders=encoders)
    assert "tokenizer_3 has no tokens for a part of it" in told


def test_what_the_check_counts_is_what_the_pipeline_cuts(clips):
    text = "a photo of a purple ring and a yellow heart and a ring"
    cut = clips[0].tokenizer(text, padding="max_length", max_length=12, truncation=True).input_ids
    (tokens,) = clips[0].tokenize([text])
    assert tuple(cut[1:-1]) == clips[0].seen(tokens) == tokens[:10]


def test_a_folder_without_tokenizers_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"policy.pretrained: the tokenizers of .* cannot be read .*; give the folder"
    ):
        make_text_encoders(str(tmp_path), None, 0)


@pytest.mark.parametrize(
    "twin",
    [
        RING,
        reworded(RING, "A Photo of a RING"),
        reworded(RING, "  a  photo of\ta ring\n"),
        reworded(RING, "a\u00a0photo of a ring"),
        reworded(RING, "a photo of a \uff52ing"),
        reworded(RING, "a photo of a ri\u200bng"),
    ],
)
@pytest.mark.parametrize("with_encoders", [True, False])
def test_repeated_evaluation_prompts_are_refused(clips, twin, with_encoders):
    # Without encoders texts are compared as they are written; with them some of these cannot be read at all.
    told = refused(
        "evaluation prompts repeat an earlier one|no text encoder of the base model reads the whole",
        file_of(RING, HEART, twin),
        (),
        encoders=clips if with_encoders else (),
    )
    assert told.startswith("evaluation.jsonl:5: ")


def test_the_message_counts_the_repeats():
    told = refused("3 of 5", file_of(RING, HEART, RING, HEART, RING), ())
    assert told.startswith(
        'evaluation.jsonl:5: 3 of 5 evaluation prompts repeat an earlier one, the first "a photo of a '
    )
    assert (
        'which is line 1 once more, "a photo of a ring"; take them out, and raise evaluation.images_per_prompt' in told
    )


def test_texts_of_the_same_tokens_repeat_each_other(clips):
    # To the tokenizer a hyphen stands apart; the texts differ.
    twins = reworded(RING, "a photo - a ring"), reworded(RING, "a photo-a ring")
    assert clips[0].tokenize([twins[0].text]) == clips[0].tokenize([twins[1].text])
    check_prompts(file_of(*twins), ())
    refused("repeat an earlier one", file_of(*twins), (), encoders=clips)


def test_a_request_that_stands_in_two_tasks_repeats_itself():
    again = Prompt(text="the image of one ring", tag="counting", include=RING.include)
    refused("repeat an earlier one", file_of(RING, again), ())


def test_wordings_of_one_request_may_be_evaluated_side_by_side():
    check_prompts(
        file_of(two_object("ring", "heart"), two_object("heart", "ring"), RING, reworded(RING, "one ring")), ()
    )


def test_training_may_repeat_its_prompts(clips):
    training = file_of(RING, RING, reworded(RING, "A photo of a ring"), name="train.jsonl")
    check_prompts(file_of(HEART), (), training=training, encoders=clips)


@pytest.mark.parametrize(
    ("asked", "trained"),
    [
        (RING, RING),
        (RING, reworded(RING, "A PHOTO of a  ring")),
        (RING, reworded(RING, "one ring")),
        (RING, Prompt(text="one ring", tag="counting", include=RING.include)),
        (two_object("ring", "heart"), two_object("heart", "ring")),
        (
            color_attr("ring", "heart", "red", "blue"),
            color_attr("heart", "ring", "blue", "red"),
        ),
        (counting("ring", 3), dataclasses.replace(counting("ring", 3), exclude=(), text="rings, three of them")),
        (position("ring", "heart", "above"), reworded(position("ring", "heart", "above"), "over a heart a ring")),
        # The text is the same, the metadata are not.
        (RING, reworded(HEART, "a photo of a ring")),
    ],
)
def test_training_prompts_that_are_evaluated_on_are_refused(asked, trained):
    told = refused(
        r"^train.jsonl:3: 1 of 2 training prompts are evaluated on, the first .*; take them out of one of the two",
        file_of(colors("ring", "red"), asked),
        (),
        training=file_of(colors("ring", "green"), trained, name="train.jsonl"),
    )
    assert (
        f"{json.dumps(trained.text)}, which asks for the same as evaluation.jsonl:3, {json.dumps(asked.text)}" in told
    )


@pytest.mark.parametrize("held_out_in", ["evaluation", "validation"])
@pytest.mark.parametrize("twin", [two_object("ring", "heart"), two_object("heart", "ring")])
def test_validation_prompts_share_nothing_with_the_other_files(held_out_in, twin):
    asked, other = two_object("ring", "heart"), file_of(RING, name="evaluation.jsonl")
    if held_out_in == "evaluation":
        sets = {"evaluation": file_of(asked), "validation": file_of(HEART, twin, name="validation.jsonl")}
        told = (
            r"^validation.jsonl:3: 1 of 2 validation prompts are evaluated on, .* evaluation.jsonl:1, .*; take them out"
        )
    else:
        sets = {
            "evaluation": other,
            "validation": file_of(asked, name="validation.jsonl"),
            "training": file_of(HEART, twin, name="train.jsonl"),
        }
        told = (
            r"^train.jsonl:3: 1 of 2 training prompts are validation prompts, .* validation.jsonl:1, .*; take them out"
        )
    refused(told, judges=(), **sets)


def test_repeated_validation_prompts_are_refused():
    refused(
        r"^validation.jsonl:5: 1 of 3 validation prompts repeat an earlier one",
        file_of(colors("ring", "red")),
        (),
        validation=file_of(RING, HEART, RING, name="validation.jsonl"),
    )


@pytest.mark.parametrize(
    ("asked", "trained"),
    [
        (position("ring", "heart", "above"), position("heart", "ring", "above")),
        # The same image, and another word to learn.
        (position("ring", "heart", "above"), position("heart", "ring", "below")),
        (RING, colors("ring", "red")),
        (counting("ring", 2), counting("ring", 3)),
        (color_attr("ring", "heart", "red", "blue"), color_attr("ring", "heart", "blue", "red")),
        (two_object("ring", "heart"), position("ring", "heart", "above")),
    ],
)
def test_prompts_that_ask_for_something_else_are_no_overlap(asked, trained):
    check_prompts(file_of(asked), (), training=file_of(trained))


@pytest.mark.parametrize(
    "other",
    [
        reworded(HEART, "a photo of a ring"),
        reworded(HEART, "A photo of a Ring"),
        dataclasses.replace(RING, tag="counting"),
        dataclasses.replace(RING, exclude=(Clause(class_name="heart", count=1),)),
    ],
)
def test_one_text_with_two_sets_of_rules_is_refused(clips, other):
    told = refused(
        r"^train.jsonl:3: .* reads like line 1, .*, and is judged by other rules",
        file_of(single_object("cross")),
        (),
        training=file_of(RING, other, name="train.jsonl"),
        encoders=clips,
    )
    assert re.search(r"make their tag, include and exclude the same, or reword one of them$", told)


@pytest.mark.parametrize("role", ["training", "validation", "evaluation"])
def test_prompts_that_a_reward_cannot_score_are_refused_with_their_line(role):
    dog, judge = single_object("dog"), [build_reward("likeness")]
    if role == "training":
        sets = {"evaluation": file_of(RING), "judges": (), "training": file_of(HEART, dog), "rewards": judge}
    elif role == "validation":
        sets = {"evaluation": file_of(RING), "judges": judge, "validation": file_of(HEART, dog)}
    else:
        sets = {"evaluation": file_of(RING, dog), "judges": judge, "training": file_of(HEART, dog), "rewards": ()}
    told = refused('evaluation.jsonl:3: reward likeness knows no class "dog"; it knows circle, square', **sets)
    assert "use another reward" in told


def test_the_reward_by_clip_refuses_what_it_would_cut():
    reward = build_reward("clip", pretrained=str(ROOT / "models/shapes-clip"))
    reward.check_prompt(RING)
    with pytest.raises(ValueError, match=r"reward clip takes 12 tokens of \d+ .*; shorten or reword the prompt"):
        reward.check_prompt(reworded(RING, LONG))
    with pytest.raises(ValueError, match="reward clip has no tokens for a part of it"):
        reward.check_prompt(reworded(RING, "a ring!"))
