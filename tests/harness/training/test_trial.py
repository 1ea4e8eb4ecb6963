from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import update_bn

from harness import tasks
from harness.errors import UserError
from harness.registry.entry import SpeedupRecipe
from harness.tasks.base import target_entropy
from harness.training import checkpoints, stages
from harness.training.loop import evaluate_test
from harness.training.reference import reference_loss
from harness.training.speedup import Trial
from harness.training.trial import renew_batch_norm, run_trial

RECIPE = SpeedupRecipe(num_steps=32, batch_size=32, sgd_lr=0.1, adamw_lr=1e-2, eval_size=256)


@pytest.fixture
def entry(make_entry):
    return make_entry(recipe=None, speedup=RECIPE, stages=("init",))


@pytest.fixture(scope="module")
def data():
    return tasks.get("digits").load()


def trial(entry, data, **changes):
    row, kept = run_trial(entry, data, replace(Trial("sgd", 32, 0.1, seed=1), **changes))
    assert not kept
    return row


def without_times(row):
    return {k: v for k, v in row.items() if not k.endswith("seconds")}


def test_a_run_is_repeated_bit_for_bit_and_learns(entry, data):
    one, other = (without_times(trial(entry, data)) for _ in range(2))
    assert one == other
    assert one["final_loss"] < 0.7 * one["init_loss"]
    assert 0.5 < one["accuracy"] <= 1


def test_the_loss_is_taken_at_seventeen_points_from_before_the_first_step(entry, data):
    row = trial(entry, data)
    assert row["eval_steps"] == list(range(0, 33, 2))
    assert row["eval_losses"][0] == row["init_loss"]
    assert row["eval_losses"][-1] == row["final_loss"]


def test_both_optimizers_start_from_the_same_model(entry, data):
    rows = [trial(entry, data, optimizer=o, lr=1e-3) for o in ("sgd", "adamw")]
    assert rows[0]["init_loss"] == rows[1]["init_loss"]
    assert rows[0]["final_loss"] != rows[1]["final_loss"]
    assert trial(entry, data, seed=2)["init_loss"] != rows[0]["init_loss"]


def test_the_reference_is_the_smaller_of_the_initial_loss_and_the_targets_entropy(entry, data):
    task = tasks.get("digits")
    row = trial(entry, data)
    assert row["target_entropy"] == target_entropy(task, task.fixed(data, "train", 256))
    assert row["target_entropy"] == pytest.approx(math.log(10), abs=0.02)
    assert row["reference_loss"] == min(row["init_loss"], row["target_entropy"])
    assert reference_loss(entry, 9.0, 2.3) == 2.3
    assert reference_loss(entry, 2.0, 2.3) == 2.0
    assert reference_loss(entry, 9.0, None) == 9.0  # targets that are no classes


def test_a_pretrained_model_knows_the_frequencies_already(make_entry):
    tuned = make_entry(recipe=None, speedup=RECIPE, stages=("init",), pretrained="other")
    assert reference_loss(tuned, 9.0, 2.3) == 9.0


def test_a_run_that_diverges_has_no_final_loss_and_only_finite_ones_in_its_curve(entry, data):
    row = trial(entry, data, lr=1e6)
    assert row["diverged"]
    assert row["final_loss"] is None
    assert all(map(math.isfinite, row["eval_losses"]))
    assert row["eval_steps"][0] == 0


def test_a_longer_run_is_a_schedule_of_its_own(entry, data):
    short, long = trial(entry, data), trial(entry, data, num_steps=64)
    shared = dict(zip(long["eval_steps"], long["eval_losses"], strict=True))
    assert shared[32] != short["final_loss"]
    assert long["eval_steps"][-1] == 64


def test_batch_norm_has_the_statistics_of_the_images_as_the_weights_are(entry, data):
    task = tasks.get("digits")
    model = entry.build(data.model_options, 0)
    batches = tasks.split(task.fixed(data, "train", 256), 64)
    reference = copy.deepcopy(model)
    update_bn(batches, reference)
    momentum = model[1].momentum
    renew_batch_norm(model, task, batches)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[1], name), getattr(reference[1], name))
    assert model[1].momentum == momentum


def test_looking_at_the_loss_changes_nothing_of_the_training(entry, data, monkeypatch):
    seen = trial(entry, data)["final_loss"]
    monkeypatch.setattr("harness.training.trial.NUM_EVALUATIONS", 1)
    assert trial(entry, data)["final_loss"] == seen


def test_the_weights_that_others_start_from_are_kept(entry, data, tmp_path):
    asked = Trial("adamw", 32, 1e-2, seed=1)
    row, [kept] = run_trial(entry, data, asked, checkpoint_dir=tmp_path, keep=True)
    model = entry.build(data.model_options, 9)
    path = stages.checkpoint_path(tmp_path, entry.name, 1, "final")
    facts = checkpoints.load(model, path, sha256=kept["checkpoint_sha256"], entry=entry)
    assert facts["loss"] == kept["loss"] == row["final_loss"]
    task = tasks.get(entry.task)
    assert kept["metric"] == evaluate_test(task, model, data, entry.speedup, "cpu")[1]


def test_an_entry_without_a_recipe_is_refused(make_entry, data):
    with pytest.raises(UserError, match="no speedup recipe"):
        trial(make_entry(), data)
