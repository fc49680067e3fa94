"""The names that parameters take are those that the tables of the method know."""

from __future__ import annotations

from typing import get_args

from sfgrpo.grpo.advantages import NORMALISED_DIMS
from sfgrpo.grpo.sde import SAMPLERS
from sfgrpo.types import Credit, SamplerName


def test_every_name_of_a_sampler_has_a_rule():
    assert set(get_args(SamplerName)) == set(SAMPLERS)


def test_every_credit_has_its_dimensions():
    assert set(get_args(Credit)) == set(NORMALISED_DIMS)
