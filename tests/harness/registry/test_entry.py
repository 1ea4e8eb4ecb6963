from __future__ import annotations

import pickle
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.registry import ModelEntry, Recipe
from harness.registry.entry import SpeedupRecipe

RECIPE = Recipe(num_steps=10, batch_size=4, sgd_lrs=(1e-2, 1.0), adamw_lrs=(1e-3, 1e-1))
SPEEDUP = SpeedupRecipe(num_steps=10, batch_size=4, sgd_lr=1.0, adamw_lr=1e-2)
ENTRY = ModelEntry(
    name="tiny",
    family="linear",
    tier="demo",
    factory="torch.nn:Linear",
    options={"in_features": 3, "out_features": 2},
    task="digits",
    hessian_batch_size=4,
    recipe=RECIPE,
    stages=("init", "final"),
    source="torch",
    reference="none",
    licence="BSD-3-Clause",
    description="A linear map",
)


def changed(**values: Any) -> ModelEntry:
    return replace(ENTRY, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Two words"}, "name is 'Two words'; use lower-case letters"),
        ({"name": "../up"}, "name is '../up'; use lower-case letters"),
        ({"name": "all"}, "it names what is of all models together"),
        ({"family": ""}, "family is ''; use lower-case letters"),
        ({"tier": "large"}, "tier is 'large'; choose one of demo, small, paper"),
        ({"factory": "torch.nn.Linear"}, "write module:callable"),
        ({"stages": ("init", "p99")}, "choose from init, p10, p25, p50, final"),
        (
            {"recipe": None, "speedup": SPEEDUP, "stages": ("init", "p25", "final")},
            "trials keep final weights alone: choose from init, final",
        ),
        ({"full_stages": ("p25",)}, "full_stages is ('p25',); they must be among the stages"),
        ({"recipe": None}, "without a recipe there is only init"),
        ({"hessian_batch_size": 0}, "hessian_batch_size is 0; it must be at least 1"),
        ({"microbatch_size": 0}, "microbatch_size is 0; it must be at least 1"),
        ({"num_probes": 0}, "num_probes is 0; it must be at least 1"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"licence": " "}, "licence is ' '; it must not be empty"),
        ({"status": "pending"}, "use ok without a reason, or pending with one"),
        ({"reason": "none"}, "use ok without a reason, or pending with one"),
        ({"status": "failed", "reason": "none"}, "use ok without a reason, or pending with one"),
    ],
)
def test_a_mistake_in_an_entry_is_named_with_the_remedy(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        changed(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"eval_size": 0}, "eval_size is 0; it must be at least 1"),
        ({"num_lrs": 1}, "num_lrs is 1; it must be at least 2"),
        ({"sgd_lrs": (1.0, 0.1)}, "sgd_lrs is (1.0, 0.1); it must be 0 < lowest < highest"),
        ({"adamw_lrs": (0.0, 0.1)}, "adamw_lrs is (0.0, 0.1); it must be 0 < lowest < highest"),
        ({"sgd_lrs": 0.1}, "sgd_lrs is 0.1; it must be the lowest and the highest rate"),
        ({"adamw_lrs": (1e-3, 1e-2, 0.1)}, "it must be the lowest and the highest rate"),
        ({"schedule": "linear"}, "schedule is 'linear'; choose cosine or constant"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_the_remedy(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        replace(RECIPE, **values)


def test_an_entry_is_frozen_with_its_options() -> None:
    with pytest.raises(FrozenInstanceError):
        ENTRY.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ENTRY.options["in_features"] = 4  # type: ignore[index]


def test_stages_in_a_list_are_those_in_a_tuple() -> None:
    assert changed(recipe=None, stages=["init"]) == changed(recipe=None, stages=("init",))


def test_an_entry_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(ENTRY)) == ENTRY


def test_the_factory_gets_the_options_that_it_names_and_the_entry_wins() -> None:
    model = ENTRY.build({"in_features": 7, "vocab_size": 5}, 0)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3


def test_building_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ENTRY.build({}, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factory": "no_such_module:f"}, "factory 'no_such_module:f' can't be imported"),
        ({"factory": "torch.nn:Linaer"}, "factory 'torch.nn:Linaer' can't be imported"),
        ({"options": {"in_features": 3}}, "torch.nn:Linear failed with TypeError"),
        (
            {"factory": "pathlib:PurePosixPath", "options": {}},
            "returned PurePosixPath; it must return a torch.nn.Module",
        ),
    ],
)
def test_a_factory_that_fails_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        changed(**values).build({}, 0)


def test_only_an_entry_with_a_recipe_and_later_stages_trains() -> None:
    assert ENTRY.grid_recipe == ENTRY.recipe
    assert changed(stages=("init",)).grid_recipe is None
    assert changed(stages=("init",), recipe=None).trained_by is None
