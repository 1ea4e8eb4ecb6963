from __future__ import annotations

import shlex
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.trainer_callback import CallbackHandler

import harness
import spectra_db
from harness.errors import UserError

BATCH = (
    torch.randn(12, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 3,
)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Tanh(), nn.Linear(6, 3))


def test_a_training_of_one_s_own_leaves_tables_of_its_spectra_and_goes_on_unchanged(tmp_path):
    def train(record):
        model = network()
        update = torch.optim.SGD(model.parameters(), 0.5)
        for step in range(7):
            record(model, step)
            assert model.training
            update.zero_grad()
            loss(model, BATCH).backward()
            update.step()
        return model

    record = harness.Recorder(tmp_path, "mine", loss, [BATCH], every=3)
    model = train(record)
    record.take(model, 7)
    alone = train(lambda model, step: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name))

    rows = spectra_db.load("spectra", source=tmp_path)
    assert set(rows["stage"]) == {"step-0", "step-3", "step-6", "step-7"}
    expected = harness.estimate_spectra(model, loss, [BATCH], num_probes=3, num_steps=10)
    last = spectra_db.load("spectra", source=tmp_path, stage="step-7")
    assert [list(x) for x in last["nodes"]] == [list(x) for x in expected["nodes"]]
    found = spectra_db.load("heterogeneity", source=tmp_path, stage="step-7", metric="js0")
    by_scale = found.set_index("scale")["corrected"]
    assert by_scale["own_rms"] == pytest.approx(spectra_db.js0(expected).corrected)
    assert spectra_db.load("models", source=tmp_path)["num_params"].item() == 51
    runs = spectra_db.load("runs", source=tmp_path)
    assert set(runs["command"]) == {shlex.join(sys.argv)}  # not a command of ours
    assert set(runs["device"]) == {"cpu"}


def test_a_trainer_s_callback_takes_the_same(tmp_path):
    record = harness.Recorder(tmp_path, "mine", loss, [BATCH], every=2)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    model = network()
    handler = CallbackHandler([record.for_trainer()], model, None, None, None)
    for step in range(3):
        state.global_step = step
        handler.on_step_begin(None, state, control)
    state.global_step = 3
    handler.on_train_end(None, state, control)
    stages = spectra_db.load("spectra", source=tmp_path)["stage"]
    assert set(stages) == {"step-0", "step-2", "step-3"}


def test_the_batch_is_one_though_a_loader_shuffles_and_other_arithmetic_leaves_the_metrics(
    tmp_path,
):
    class Loader:
        """Gives other samples each time."""

        times = 0

        def __iter__(self):
            self.times += 1
            yield tuple(t.roll(self.times, 0)[:8] for t in BATCH)

    options = {"every": 1, "partition": "weights"}
    record = harness.Recorder(tmp_path, "mine", loss, Loader(), **options)
    for step in (0, 1):
        record(network(), step)
    rows = spectra_db.load("spectra", source=tmp_path)
    assert rows["batch_hash"].nunique() == 1
    before = spectra_db.load("heterogeneity", source=tmp_path)
    harness.Recorder(tmp_path, "mine", loss, [BATCH], dtype="float64", **options)(network(), 0)
    assert set(spectra_db.load("spectra", source=tmp_path)["dtype"]) == {"float32", "float64"}
    assert spectra_db.load("heterogeneity", source=tmp_path).equals(before)


@pytest.mark.parametrize("step", [-1, 2.0, "2"])
def test_a_step_that_is_no_count_is_refused(tmp_path, step):
    record = harness.Recorder(tmp_path, "mine", loss, [BATCH], every=1)
    with pytest.raises(UserError, match=r"step is .*whole number"):
        record(network(), step)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "No Slug"}, "name is 'No Slug'"),
        ({"every": 0}, "every is 0"),
        ({"num_probes": 2}, "num_probes is 2"),
        ({"probes": 2}, "no argument 'probes'"),
        ({"partition": "rows"}, "unknown partition 'rows'"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path, given, said):
    plain = {"name": "mine", "loss_fn": loss, "batches": [BATCH], "every": 1}
    with pytest.raises(UserError, match=said):
        harness.Recorder(tmp_path / "out", **plain | given)(network(), 0)
    assert not (tmp_path / "out").exists()
