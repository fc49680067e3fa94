import pytest
import torch
from torch import nn

from sfgrpo.training.ema import Ema


def parameters(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), value, dtype=dtype), "bias": torch.full((2,), -value, dtype=dtype)}


def module_of(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(3, 2, dtype=dtype)
    module.load_state_dict(parameters(value, dtype))
    return module


def test_average_starts_as_the_parameters_and_is_no_alias_of_them():
    original = parameters(1.0)
    ema = Ema(original, decay=0.9)
    original["weight"].zero_()
    torch.testing.assert_close(ema.averages, parameters(1.0))


def test_first_updates_are_warmed_up():
    ema = Ema(parameters(0.0), decay=0.9)
    ema.update(parameters(1.0))
    torch.testing.assert_close(ema.averages, parameters(0.9))  # decay 1/10
    ema.update(parameters(1.0))
    torch.testing.assert_close(ema.averages, parameters(1 - 0.1 * 2 / 11))


def test_average_of_a_constant_input_has_the_closed_form():
    ema = Ema(parameters(0.0), decay=0.5)
    product = 1.0
    for count in range(30):
        ema.update(parameters(1.0))
        product *= min(0.5, (1 + count) / (10 + count))
    torch.testing.assert_close(ema.averages, parameters(1 - product))


def test_warm_average_is_the_geometric_sum_of_its_inputs():
    ema = Ema(parameters(0.0), decay=0.1)  # 1/10 at once, so never warmed up
    inputs = [3.0, -1.0, 4.0, 1.0]
    for value in inputs:
        ema.update(parameters(value))
    expected = sum(0.9 * 0.1**age * value for age, value in enumerate(reversed(inputs)))
    torch.testing.assert_close(ema.averages, parameters(expected))


def test_decay_zero_follows_the_parameters():
    ema = Ema(parameters(0.0), decay=0.0)
    ema.update(parameters(5.0))
    torch.testing.assert_close(ema.averages, parameters(5.0))


def test_average_of_bfloat16_parameters_is_float32():
    ema = Ema(parameters(1.0, torch.bfloat16), decay=0.999)
    ema.num_updates = 10**6
    ema.update(parameters(2.0, torch.bfloat16))
    torch.testing.assert_close(ema.averages, parameters(1.001))


def test_averages_are_swapped_in_and_the_parameters_come_back_bit_for_bit():
    module = module_of(1 / 3, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema = Ema(parameters(2.0), decay=0.9)
    with ema.swapped_in(module):
        torch.testing.assert_close(dict(module.state_dict()), parameters(2.0, torch.bfloat16))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_parameters_come_back_after_an_error():
    module = module_of(1.0)
    with pytest.raises(RuntimeError, match="inside"), Ema(parameters(2.0), decay=0.9).swapped_in(module):
        raise RuntimeError("inside")
    torch.testing.assert_close(dict(module.state_dict()), parameters(1.0))


def test_swapping_keeps_the_tensors_that_the_optimiser_holds():
    module = module_of(1.0)
    held = module.weight
    with Ema(parameters(2.0), decay=0.9).swapped_in(module):
        assert module.weight is held
        assert module.weight.requires_grad


def test_frozen_parameters_are_not_swapped():
    module = module_of(1.0)
    with Ema({"bias": torch.zeros(2)}, decay=0.9).swapped_in(module):
        torch.testing.assert_close(module.weight.detach(), parameters(1.0)["weight"])
        torch.testing.assert_close(module.bias.detach(), torch.zeros(2))


def test_state_goes_on_where_it_was_saved():
    one = Ema(parameters(0.0), decay=0.9)
    one.update(parameters(1.0))
    two = Ema(parameters(7.0), decay=0.9)
    two.load_state_dict(one.state_dict())
    for ema in (one, two):
        ema.update(parameters(3.0))
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_saved_state_does_not_change_with_the_next_update():
    ema = Ema(parameters(0.0), decay=0.9)
    state = ema.state_dict()
    ema.update(parameters(1.0))
    torch.testing.assert_close(state["average.weight"], torch.zeros(2, 3))


@pytest.mark.parametrize("other", [{"weight": torch.zeros(2, 3)}, parameters(1.0) | {"scale": torch.zeros(1)}])
def test_other_parameters_are_refused(other):
    ema = Ema(parameters(0.0), decay=0.9)
    with pytest.raises(ValueError, match=r"(bias|scale) are on one side only; .* of exactly the 2 parameters"):
        ema.update(other)


def test_module_without_an_averaged_parameter_is_refused():
    ema = Ema(parameters(0.0) | {"lora": torch.zeros(1)}, decay=0.9)
    with pytest.raises(ValueError, match="lora are on one side only"), ema.swapped_in(module_of(1.0)):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay {decay} is not in \[0, 1\)"):
        Ema(parameters(0.0), decay=decay)
