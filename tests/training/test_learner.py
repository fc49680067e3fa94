"""The learner: the averaged adapter, and a state that comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.checkpoint.state import TrainingState
from sfgrpo.training.learner import Learner
from tests.support.comparing import assert_same
from tests.support.tiny import disturb, make_tiny_policy
from tests.support.trainings import adapter_of, small_config


def learner_of(decay: float = 0.9) -> Learner:
    return Learner(make_tiny_policy(), small_config(ema={"decay": decay}))


def averages_of(learner: Learner) -> dict[str, torch.Tensor]:
    with learner.averaged():
        return adapter_of(learner.policy)


def test_average_warms_up_from_the_first_update_on():
    learner, seen = learner_of(), []
    for seed in range(4):
        disturb(learner.policy, seed)
        learner.average()
        seen.append(adapter_of(learner.policy))
    expected = seen[0]
    for decay, adapter in zip((2 / 11, 3 / 12, 4 / 13), seen[1:], strict=True):
        expected = {name: decay * value + (1 - decay) * adapter[name] for name, value in expected.items()}
    torch.testing.assert_close(averages_of(learner), expected)


def test_decay_is_never_more_than_asked_for():
    learner = learner_of(decay=0.1)
    for seed in range(2):
        disturb(learner.policy, seed)
        before = averages_of(learner)
        learner.average()
    expected = {name: 0.1 * before[name] + 0.9 * value for name, value in adapter_of(learner.policy).items()}
    torch.testing.assert_close(averages_of(learner), expected)


def test_adapter_comes_back_bit_for_bit_even_after_an_error():
    learner = learner_of()
    disturb(learner.policy)
    before, held = adapter_of(learner.policy), list(learner.policy.adapter_parameters().values())
    with pytest.raises(RuntimeError, match="inside"), learner.averaged():
        assert any(not torch.equal(value, before[name]) for name, value in adapter_of(learner.policy).items())
        raise RuntimeError("inside")
    assert_same(adapter_of(learner.policy), before)
    # The optimiser holds these very tensors.
    now = learner.policy.adapter_parameters().values()
    assert all(one is other for one, other in zip(now, held, strict=True))


def test_state_goes_on_where_it_was_saved():
    one, two = learner_of(), learner_of()
    for seed in range(3):
        disturb(one.policy, seed)
        one.average()
    two.load(TrainingState(update_index=3, **one.state(), rng={}, config={}, history=()))
    for learner in (one, two):
        disturb(learner.policy, seed=9)
        learner.average()
    assert_same(averages_of(two), averages_of(one))
    assert_same(two.state()["ema"], one.state()["ema"])


def rates(**update: object) -> list[float]:
    learner = Learner(make_tiny_policy(), small_config(update={"learning_rate": 0.4, "num_updates": 4, **update}))
    found = []
    for index in range(4):
        learner.set_learning_rate(index)
        found.append(learner.learning_rate)
    return found


def test_linear_rate_falls_to_nothing_after_the_last_update():
    assert rates(lr_scheduler="linear") == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_constant_rate_stays():
    assert rates(lr_scheduler="constant") == [0.4] * 4
