"""Spectra, trainings, a campaign and the GPU's stages by CUDA's rules, with the CPU's numbers."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cases import small
from benchmarks.gpu import products, rows, spectra
from benchmarks.gpu.desk import Desk
from benchmarks.gpu.entries import find
from harness import estimate_spectra, tasks
from harness.campaign.plan import missing
from harness.campaign.run import run_entries
from harness.campaign.survey import survey
from harness.campaign.work import Job
from harness.estimator import hessian
from harness.estimator.graphs import Graph
from harness.estimator.settings import Settings
from harness.records.ledger import Ledger
from harness.registry import ModelEntry, entries, get
from harness.training import load_problem, train
from harness.training.checkpoints import initial_model
from harness.training.loop import running, updates
from spectra_db import load as load_table
from tests.cuda_emulation import CUDA, NAME, OnCuda, emulated_cuda

FAMILIES = {entry.family: entry.name for entry in reversed(entries("small"))}


def test_tensors_of_two_devices_do_not_mix():
    with emulated_cuda():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == CUDA
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            here + there
        with pytest.raises(TypeError, match="to copy the tensor to host"):
            there.numpy()
        with pytest.raises(RuntimeError, match="indices should be"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        assert (there * 2).cpu().tolist() == [2, 2, 2]
        assert torch.equal(there + torch.tensor(1.0), there * 2)  # a number may come from the CPU


def test_tied_weights_stay_tied_and_train_together():
    with emulated_cuda():
        one, two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        two.weight = one.weight
        model = nn.Sequential(one, nn.Tanh(), two).to("cuda")
        assert model[0].weight is model[2].weight
        assert isinstance(model[0].weight, OnCuda)
        assert len(list(model.parameters())) == 1
        model(torch.ones(2, 3, device="cuda")).sum().backward()
        assert model[0].weight.grad.device == CUDA


def test_nothing_is_left_of_the_emulation():
    before = torch.Tensor.to, nn.Module._apply, torch.cuda.is_available()
    with emulated_cuda():
        assert torch.cuda.is_available()
    assert (torch.Tensor.to, nn.Module._apply, torch.cuda.is_available()) == before


def test_kernels_without_a_deterministic_version_are_seen():
    with emulated_cuda() as seen:
        x = torch.ones(1, 1, 4, 4, device="cuda", requires_grad=True)
        nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()
    assert dict(+seen.nondeterministic) == {"upsample_bilinear2d_backward": 1}


def shrunk(name: str) -> ModelEntry:
    """Return an entry on few images, or on short sequences."""
    entry = get(name)
    small = {"context": 8} if "context" in entry.task_options else {"train_size": 8, "test_size": 8}
    return replace(entry, task_options=dict(entry.task_options) | small)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_spectrum_of_every_family_is_that_of_the_cpu(data_root, family):
    problem = load_problem(shrunk(FAMILIES[family]), data_root=data_root, batch_size=2)
    blocks = problem.blocks("weights")
    some = {"blocks": [blocks[0], blocks[-1]], "num_probes": 1, "num_steps": 2, "exact_size": 0}
    here = estimate_spectra(problem.model, problem.loss_fn, problem.batches, **some)
    with emulated_cuda():
        there = estimate_spectra(
            problem.model, problem.loss_fn, problem.batches, device="cuda", **some
        )
    assert set(there["device"]) == {NAME}
    for column in ("alphas", "betas"):  # float32's rounding: another path may be taken
        np.testing.assert_allclose(list(there[column]), list(here[column]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_run_is_that_of_the_cpu(optimizer):
    entry = find("tiny-gpt", rehearse=True)
    data = tasks.get(entry.task, **entry.task_options).load()
    run = {"optimizer": optimizer, "lr": 1e-2, "seed": 1}
    here = train(entry, data, **run)
    with emulated_cuda():
        there = train(entry, data, device="cuda", **run)
    assert there.final_loss == pytest.approx(here.final_loss, rel=1e-5)
    assert there.init_loss == here.init_loss != there.final_loss


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_of_training_waits_for_nothing(optimizer):
    entry = find("tiny-gpt", rehearse=True)
    task = tasks.get(entry.task, **entry.task_options)
    data = task.load()
    with emulated_cuda() as seen:
        model = initial_model(entry, data.model_options, 1, None).to("cuda")
        steps = updates(
            model, task, data, replace(entry.recipe, clip=1.0), optimizer=optimizer,
            rate_at=lambda step: 1e-2, num_steps=4, seed=1, device="cuda",
        )  # fmt: skip
        with running(model, 1, "cuda"):
            next(steps)  # which looks once what the model returns
            seen.waits.clear()
            list(steps)
        assert not +seen.waits
        assert next(steps, None) is None


def test_training_computes_in_the_arithmetic_of_the_spectra():
    cuda = torch.backends.cuda
    if not hasattr(cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has another way to ask")
    with emulated_cuda():
        before = torch.are_deterministic_algorithms_enabled()
        cuda.matmul.fp32_precision = "tf32"
        with running(nn.Linear(2, 2), 1, "cuda"):
            assert torch.are_deterministic_algorithms_enabled()
            assert cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.are_deterministic_algorithms_enabled() == before
        assert cuda.matmul.fp32_precision == "tf32"
        cuda.matmul.fp32_precision = "ieee"


def test_one_graph_of_a_model_is_held_at_a_time(tmp_path, monkeypatch):
    live: weakref.WeakSet[Graph] = weakref.WeakSet()
    most = []

    class Counted(Graph):
        __hash__ = object.__hash__

        def __init__(self, *args):
            super().__init__(*args)
            live.add(self)
            most.append(len(live))

    monkeypatch.setattr(hessian, "Graph", Counted)
    monkeypatch.setattr(products, "matmul_rate", lambda device: 1e12)
    monkeypatch.setattr(products, "cases", lambda rehearse: {"cnn": partial(small, "cnn")})
    desk = Desk(tmp_path, tmp_path / "scratch", "cpu", rehearse=True)
    assert products.measure_products(desk.at("products", 600))
    assert len(most) > 3
    assert max(most) == 1


@pytest.fixture
def _sampled(monkeypatch) -> None:
    """Let small blocks be sampled too, in fewer products than it takes to be exact."""
    monkeypatch.setattr(Settings, "is_exact", lambda self, num_params: False)


@pytest.mark.slow
@pytest.mark.usefixtures("_sampled")
def test_a_campaign_runs_whole(tmp_path):
    entry = replace(find("tiny-gpt", rehearse=True), num_steps=1)
    job = Job(Ledger(tmp_path), {entry.name: entry}, None, "cuda", "harness run")
    with emulated_cuda():
        assert run_entries([survey(entry, None)], job) == {}
    assert not list(missing(entry, Ledger(tmp_path)))
    assert set(load_table("spectra", source=tmp_path)["device"]) == {NAME}


@pytest.mark.slow
@pytest.mark.usefixtures("_sampled")
def test_the_stages_that_compute_run_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ARITHMETICS", {
        name: rows.ARITHMETICS[name] for name in ("cpu float64", "float32", "float32 again")
    })  # fmt: skip
    monkeypatch.setattr(products, "matmul_rate", lambda device: 1e12)  # a card's size: minutes here
    # Batched products are of vmap, under which the wrappers take minutes.
    monkeypatch.setattr(products, "looped_and_batched", lambda hessian, num: (1.0, None))
    monkeypatch.setattr(products, "cases", lambda rehearse: {"cnn": partial(small, "cnn")})
    desk = Desk(tmp_path, tmp_path / "scratch", "cuda", rehearse=True)
    with emulated_cuda():
        for name, stage in (
            ("rows", rows.compare_devices),
            ("products", products.measure_products),
            ("spectra", spectra.take_spectra),
        ):
            assert stage(desk.at(name, 600)), name
    assert desk.at("rows", 0).known("tiny-gpt")["agree"]
    assert desk.at("products", 0).known("cnn TF32 probes")["looped_seconds"] > 0
    assert desk.at("products", 0).known("CUDA graph")["status"] == "failed"  # there is no kernel
    assert desk.at("spectra", 0).known("tiny-gpt 3 steps")["samples"] == 8
