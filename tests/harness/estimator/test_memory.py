"""Memory of the estimator, by tensors that live and by what processes started for it take."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from harness import estimate_spectra, find_blocks
from harness.errors import UserError
from harness.estimator.memory import PeakMemory, is_out_of_memory

from .models import cross_entropy, num_terms, problem

HEAD = """
import json, resource, torch
from torch import nn
from harness import estimate_spectra, find_blocks
from harness.registry.networks.transformer import GPT
from torch.nn import functional as F

torch.set_num_threads(1)
torch.manual_seed(0)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

def peak():  # not getrusage's, which begins with that of the process that started this one
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

def size(field):  # of the process now: 0 virtual, 1 resident
    return int(open("/proc/self/statm").read().split()[field]) * resource.getpagesize()
"""
TRANSFORMER = """
model = GPT(65, 128, num_layers=2, num_heads=4, width=64, tied=False)
tokens = torch.randint(65, (64, 129))
batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

def run(samples, **options):
    return estimate_spectra(
        model, loss, [tuple(t[:samples] for t in batch)], blocks=find_blocks(model)[:2],
        num_probes=1, num_steps=2, exact_size=0, **options,
    )

run(1)  # what is loaded and allocated once
"""
BUDGETS = """
long, batch = batch, tuple(t[:32].reshape(64, 64) for t in batch)
found = []
for mebibytes in (40, 160):
    before = size(1)
    rows = run(64, memory_budget=mebibytes << 20)
    found.append((mebibytes << 20, peak() - before, int(rows["microbatch_size"].iloc[0])))
print(json.dumps(found))
"""
LIMITED = """
batch = long
free = run(64)
limit = size(0) + (60 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
tight = run(64)
print(json.dumps([
    [int(rows["microbatch_size"].iloc[0]), [x for row in rows["nodes"] for x in row]]
    for rows in (free, tight)
]))
"""


@pytest.fixture(scope="module")
def measured():
    """Return what a process of its own found of budgets, and of a limit of its memory."""
    if sys.platform != "linux":
        pytest.skip("reads /proc, and limits a process as Linux does")
    # All but the smallest tensors are mapped each on its own, so that a process holds what they
    # do. By default the allocator of C takes them from a heap that doesn't shrink, with gaps.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + TRANSFORMER + BUDGETS + LIMITED],
        text=True, capture_output=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_peak_memory_grows_with_the_steps_only_when_reorthogonalising():
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
    batch = (torch.randn(8, 200), torch.arange(8))
    peaks = []
    for num_steps, kept in ((3, False), (30, False), (30, True)):
        with PeakMemory(torch.device("cpu")) as memory:
            estimate_spectra(
                model,
                cross_entropy,
                [batch],
                blocks=find_blocks(model)[:1],
                num_probes=2,
                num_steps=num_steps,
                reorthogonalize=kept,
            )
        peaks.append(memory.peak)
    few, many, kept = peaks
    assert many == few
    # Two probes keep 30 vectors each; half as much again is for gaps.
    assert kept - many >= 1.5 * 2 * (30 - 3) * (4 * 200**2)


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget(measured):
    found, _ = measured
    for budget, peak, _ in found:
        assert peak <= budget
    sizes = [size for _, _, size in found]
    assert sizes == sorted(set(sizes))  # a larger budget is made use of
    assert sizes[-1] < 64


@pytest.mark.slow
def test_out_of_memory_halves_the_microbatch_is_recorded_and_changes_nothing_else(measured):
    _, ((whole, nodes), (halved, same)) = measured
    assert whole == 64
    assert 1 <= halved < 64
    torch.testing.assert_close(torch.tensor(same), torch.tensor(nodes), rtol=1e-3, atol=1e-5)


def runs_out(at_size: int, after: int = 0):
    """Return the usual loss, with which memory runs out at that many samples, if derived.

    The first calls of that size may still fit: those by which graphs are sized.
    """
    calls = []

    def loss_fn(model, batch):
        if torch.is_grad_enabled() and len(batch[0]) >= at_size:
            calls.append(batch)
            if len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return cross_entropy(model, batch)

    return loss_fn


def test_halving_leaves_out_pieces_without_terms_and_keeps_the_mean():
    model, (x, y) = problem("gpt")
    y[3:] = -100  # the second half has no terms
    options = {"num_probes": 1, "num_steps": 4, "dtype": torch.float64, "exact_size": 0}
    options["batch_weights"] = num_terms
    whole = estimate_spectra(model, cross_entropy, [(x, y)], **options)
    parts = estimate_spectra(model, runs_out(3), [(x, y)], **options)
    assert set(parts["microbatch_size"]) == {2}
    for a, b in zip(whole["nodes"], parts["nodes"], strict=True):
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", [{"norm_mode": "train"}, {"batch_weights": [1.0]}])
def test_out_of_memory_that_can_not_be_halved_says_what_to_do(options):
    model, batch = problem("cnn")
    with pytest.raises(UserError, match=r"can't be halved.*pass smaller batches"):
        estimate_spectra(model, runs_out(6, after=2), [batch], dtype=torch.float64, **options)


def test_peak_counts_what_lives_at_a_time_and_no_views():
    with PeakMemory(torch.device("cpu")) as memory:
        x = torch.zeros(1000)
        y = x.view(10, 100).t() + 1
        del x
        y = y.add_(1).exp()
    assert memory.peak == 1.5 * 2 * 4000  # half as much again for gaps


def test_only_errors_of_memory_count_as_such():
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
