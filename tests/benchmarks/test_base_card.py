"""The card of the base model: other numbers in the same places."""

from __future__ import annotations

import pytest

from benchmarks.base_card import CARD, renewed_card


def test_card_of_the_repository_takes_other_numbers_and_keeps_the_rest():
    card = CARD.read_text()
    table = "| Model | Overall |\n| --- | ---: |\n| guidance 1 | 0.10 ± 0.01 |"
    renewed = renewed_card(card, 0.5, table)
    assert "; 50.0% of the detections on" in renewed
    assert renewed.endswith(f"\n\n{table}\n")
    assert renewed.split("50.0%")[0] == card.split("%", 1)[0].rsplit(" ", 1)[0] + " "
    assert renewed_card(renewed, 0.5, table) == renewed


def test_card_without_the_places_is_refused():
    with pytest.raises(ValueError, match=r"README.md: 0 places match .*; there should be one"):
        renewed_card("# Another card\n", 0.5, "| a |")
