"""Checks of prompt sets before anything is drawn: every prompt is read whole, judged, and counted once."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Self

from sfgrpo.config.loading import as_config_error
from sfgrpo.errors import ConfigError
from sfgrpo.geneval.metadata import shown
from sfgrpo.geneval.prompt_sets import twin_key
from sfgrpo.prompts import PromptFile
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.policies.text_encoders import TextEncoder, Tokens
    from sfgrpo.rewards import Reward


def check_prompts(
    evaluation: PromptFile,
    judges: Sequence[Reward],
    *,
    validation: PromptFile | None = None,
    training: PromptFile | None = None,
    rewards: Sequence[Reward] = (),
    encoders: Sequence[TextEncoder] = (),
) -> None:
    """Refuse prompts that cannot be drawn, judged or counted as they stand.

    Every prompt is read to its end by at least one text encoder, and known to the rewards that score it. What the
    encoders read alike asks for the same. No evaluation or validation prompt is there twice, none is trained on, and no
    prompt is both.

    Args:
        evaluation: Prompts that are evaluated on.
        judges: What scores them, and the validation prompts.
        validation: Prompts that select the best adapter of a training, if any.
        training: Prompts that are trained on, if any.
        rewards: What scores those.
        encoders: Text encoders of the base model; without any, texts are compared as they are written.

    Raises:
        ConfigError: one sentence with file and line.
    """
    asked = _Readings.of(evaluation, encoders)
    selecting = None if validation is None else _Readings.of(validation, encoders)
    trained = None if training is None else _Readings.of(training, encoders)
    for readings, scorers in ((trained, rewards), (selecting, judges), (asked, judges)):
        if readings is not None:
            _check_consistent(readings)
            _check_scored(readings.file, scorers)
    _check_distinct(asked, "evaluation")
    if selecting is not None:
        _check_distinct(selecting, "validation")
        _check_disjoint(selecting, asked, "validation prompts are evaluated on")
    if trained is not None:
        _check_disjoint(trained, asked, "training prompts are evaluated on")
    if trained is not None and selecting is not None:
        _check_disjoint(trained, selecting, "training prompts are validation prompts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Readings:
    """The prompts of a file as they are compared: prompts that share a key are the same in one respect."""

    file: PromptFile
    texts: Sequence[Hashable]
    """Their texts, whatever the case and the white space."""
    tokens: Sequence[Hashable]
    """What the text encoders see of them."""
    requests: Sequence[Hashable]
    """What they ask for, whatever the wording."""

    @classmethod
    def of(cls, file: PromptFile, encoders: Sequence[TextEncoder]) -> Self:
        """Read a file as the encoders do; raise `ConfigError` where none of them sees the whole of a prompt."""
        rows = [encoder.tokenize([prompt.text for prompt in file.prompts]) for encoder in encoders]
        for index, columns in enumerate(zip(*rows, strict=True)):
            _check_readable(file, index, columns, encoders)
        texts = [("text", _plain(prompt.text)) for prompt in file.prompts]
        seen = [
            ("tokens", tuple(encoder.seen(tokens) for encoder, tokens in zip(encoders, columns, strict=True)))
            for columns in zip(*rows, strict=True)
        ]
        requests = [("request", twin_key(prompt)) for prompt in file.prompts]
        return cls(file=file, texts=texts, tokens=seen or texts, requests=requests)

    def quote(self, index: int) -> str:
        """Return the text of a prompt for a message."""
        return shown(self.file.prompts[index].text)


def _plain(text: str) -> str:
    """Return a text without what looks the same: case, width, accents' spelling, white space and invisible marks."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not folded.isascii():
        folded = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return " ".join(folded.split())


def _check_readable(file: PromptFile, index: int, columns: Sequence[Tokens], encoders: Sequence[TextEncoder]) -> None:
    problems = [encoder.problem(tokens) for encoder, tokens in zip(encoders, columns, strict=True)]
    if None not in problems:
        raise ConfigError(
            f"{file.place(index)}: no text encoder of the base model reads the whole of "
            f"{shown(file.prompts[index].text)} ({', '.join(map(str, problems))}); shorten or reword it"
        )


def _check_consistent(readings: _Readings) -> None:
    """Refuse two prompts that are one to the text encoders and are judged by different rules."""
    prompts, first = readings.file.prompts, dict[Hashable, int]()
    for index, (tokens, prompt) in enumerate(zip(readings.tokens, prompts, strict=True)):
        earlier = first.setdefault(tokens, index)
        if _rules(prompts[earlier]) != _rules(prompt):
            raise ConfigError(
                f"{readings.file.place(index)}: {readings.quote(index)} reads like line "
                f"{readings.file.lines[earlier]}, {readings.quote(earlier)}, and is judged by other rules; make their "
                "tag, include and exclude the same, or reword one of them"
            )


def _rules(prompt: Prompt) -> Hashable:
    return prompt.tag, twin_key(prompt), frozenset(prompt.exclude)


def _check_scored(file: PromptFile, scorers: Sequence[Reward]) -> None:
    for index, prompt in enumerate(file.prompts):
        for scorer in scorers:
            with as_config_error(file.place(index)):
                scorer.check_prompt(prompt)


def _check_distinct(asked: _Readings, kind: str) -> None:
    """Refuse prompts that are there twice and judged: they would count as independent, and are not.

    Several wordings of a request may stand in one task, where the gates of a promotion count them as one.
    """
    first: dict[Hashable, int] = {}
    task_of: dict[Hashable, int] = {}
    repeats: list[tuple[int, int]] = []
    for index, (text, tokens, request) in enumerate(zip(asked.texts, asked.tokens, asked.requests, strict=True)):
        earlier = min(first.setdefault(key, index) for key in (text, tokens))
        same_request = task_of.setdefault(request, index)
        if asked.file.prompts[same_request].tag != asked.file.prompts[index].tag:
            earlier = min(earlier, same_request)
        if earlier < index:
            repeats.append((index, earlier))
    if repeats:
        index, earlier = repeats[0]
        raise ConfigError(
            f"{asked.file.place(index)}: {len(repeats)} of {len(asked.texts)} {kind} prompts repeat an earlier "
            f"one, the first {asked.quote(index)}, which is line {asked.file.lines[earlier]} once more, "
            f"{asked.quote(earlier)}; take them out, and raise evaluation.images_per_prompt for more images of each"
        )


def _check_disjoint(trained: _Readings, asked: _Readings, what_they_are: str) -> None:
    """Refuse prompts that are held out in another file: by text, by tokens, or by what they ask for."""
    held_out: dict[Hashable, int] = {}
    for index, keys in enumerate(zip(asked.texts, asked.tokens, asked.requests, strict=True)):
        for key in keys:
            held_out.setdefault(key, index)
    overlap = [
        (index, held_out[shared[0]])
        for index, keys in enumerate(zip(trained.texts, trained.tokens, trained.requests, strict=True))
        if (shared := [key for key in keys if key in held_out])
    ]
    if overlap:
        index, twin = overlap[0]
        raise ConfigError(
            f"{trained.file.place(index)}: {len(overlap)} of {len(trained.texts)} {what_they_are}, "
            f"the first {trained.quote(index)}, which asks for the same as {asked.file.place(twin)}, "
            f"{asked.quote(twin)}; take them out of one of the two files"
        )
