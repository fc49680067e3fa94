"""Parameters given to a run: set by dotted name, comments kept, and refused as the stages would refuse them."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

from sfgrpo.errors import ConfigError
from tasks.overrides import changed_parameters
from tests.support.stub_pipeline import ROOT

SHIPPED = (ROOT / "params.yaml").read_text(encoding="utf-8")


def test_values_change_and_all_else_stays_with_its_comments():
    changes = {"update.num_updates": 7, "prompts.edition": 2, "prompts.task_weights.counting": 4}
    text = changed_parameters(SHIPPED, changes)
    before, after = (YAML(typ="safe").load(each) for each in (SHIPPED, text))
    assert after["update"].pop("num_updates") == 7 and after["prompts"].pop("edition") == 2
    assert after["prompts"]["task_weights"].pop("counting") == 4
    before["update"].pop("num_updates")
    before["prompts"]["task_weights"].pop("counting")
    assert after == before
    assert text.count("#") == SHIPPED.count("#")


@pytest.mark.parametrize("changes", [{}, {"update.num_updates": 66}, {"prompts.edition": 0}, {"update.kl_coef": 0}])
def test_what_is_so_already_leaves_the_text_as_it_is(changes):
    assert changed_parameters(SHIPPED, changes) == SHIPPED


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"update.num_update": 7}, r"^params.yaml: update.num_update: .*did you mean num_updates\?"),
        ({"updates.num_updates": 7}, r"^params.yaml: updates: .*did you mean update\?"),
        ({"update.num_updates": "many"}, r"^params.yaml: update.num_updates: "),
        ({"prompts.edition": -1}, r"^params.yaml: prompts.edition: "),
        ({"seed.of.all": 1}, r"^params.yaml: seed.of.all: seed is a value and no section"),
        ({"update.steps_per_update": 3}, r"^params.yaml: update.steps_per_update: 3 does not divide"),
        ({"launch.num_processes": 5}, "does not divide rollout.prompts_per_update"),
    ],
)
def test_wrong_names_and_values_are_refused_with_their_place(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        changed_parameters(SHIPPED, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"extends": "/etc/passwd"},
        {"extends": "params/sd35_medium.yaml"},
        {"extends.more": 1},
        {" extends": "x"},
        {"registry.alias": "champion"},
        {"registry.alias": "challenger"},
        {"registry.model_name": "another"},
        {"registry": {"model_name": "sfgrpo-shapes", "alias": "champion"}},
        {"serving.max_steps": 1000},
        {"promotion.error_rate": 0.49},
        {"promotion.min_gain": 0},
        {"promotion": {}},
        {"seed": 1, "promotion.num_resamples": 1},
    ],
)
def test_run_chooses_neither_its_place_in_the_registry_nor_its_gates_nor_other_files(changes):
    with pytest.raises(ConfigError, match="no run may override extends, registry, serving, promotion; commit a"):
        changed_parameters(SHIPPED, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy.pretrained": "/"},
        {"policy.pretrained": "../base"},
        {"policy.pretrained": "models/../../base"},
        {"policy.pretrained": "~/base"},
        {"reward.pretrained": "/root/.cache"},
        {"reward": {"name": "clip", "pretrained": "/tmp"}},
    ],
)
def test_run_takes_no_model_from_outside_the_checkout(changes):
    with pytest.raises(ConfigError, match=r"params.yaml: (policy|reward).pretrained: '.*' is outside of the checkout"):
        changed_parameters(SHIPPED, changes)


@pytest.mark.parametrize("name", ["models/other", "stabilityai/stable-diffusion-3.5-medium"])
def test_run_may_take_another_model_of_the_checkout_or_the_hub(name):
    assert name in changed_parameters(SHIPPED, {"policy.pretrained": name})


def test_shipped_parameters_of_the_repository_are_checked_too():
    with pytest.raises(ConfigError, match=r"^params.yaml: .*correct the YAML"):
        changed_parameters("seed: [", {})
