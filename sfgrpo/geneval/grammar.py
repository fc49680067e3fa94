"""GenEval's prompt grammar: one function per task, which returns the prompt's text and metadata.

The odd plurals ("two toothbrushs") and articles ("a photo of a skis") are part of the benchmark and kept verbatim.
"""

from __future__ import annotations

from sfgrpo.types import Clause, Prompt, Relation

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def with_article(phrase: str) -> str:
    """Return the phrase after "an" if it starts with a vowel letter, else after "a"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """Return the name with "es" if it ends in "s", else with "s"."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def single_object(name: str) -> Prompt:
    """Return "a photo of a NAME"."""
    return Prompt(
        text=f"a photo of {with_article(name)}", tag="single_object", include=(Clause(class_name=name, count=1),)
    )


def two_object(first: str, second: str) -> Prompt:
    """Return "a photo of a FIRST and a SECOND"."""
    return Prompt(
        text=f"a photo of {with_article(first)} and {with_article(second)}",
        tag="two_object",
        include=(Clause(class_name=first, count=1), Clause(class_name=second, count=1)),
    )


def counting(name: str, count: int) -> Prompt:
    """Return "a photo of three NAMEs", which excludes one more than that."""
    return Prompt(
        text=f"a photo of {NUMBER_WORDS[count]} {plural(name)}",
        tag="counting",
        include=(Clause(class_name=name, count=count),),
        exclude=(Clause(class_name=name, count=count + 1),),
    )


def colors(name: str, color: str) -> Prompt:
    """Return "a photo of a COLOR NAME"."""
    return Prompt(
        text=f"a photo of {with_article(color)} {name}",
        tag="colors",
        include=(Clause(class_name=name, count=1, color=color),),
    )


def position(name: str, target: str, relation: Relation) -> Prompt:
    """Return "a photo of a NAME RELATION a TARGET"; the target is include clause 0, as in GenEval's files."""
    return Prompt(
        text=f"a photo of {with_article(name)} {relation} {with_article(target)}",
        tag="position",
        include=(Clause(class_name=target, count=1), Clause(class_name=name, count=1, position=(relation, 0))),
    )


def color_attr(first: str, second: str, first_color: str, second_color: str) -> Prompt:
    """Return "a photo of a COLOR FIRST and a COLOR SECOND"."""
    return Prompt(
        text=f"a photo of {with_article(first_color)} {first} and {with_article(second_color)} {second}",
        tag="color_attr",
        include=(
            Clause(class_name=first, count=1, color=first_color),
            Clause(class_name=second, count=1, color=second_color),
        ),
    )
