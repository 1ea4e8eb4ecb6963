from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import spectra_db
from harness.estimator.blocks import Block
from harness.estimator.cost import Forecast
from harness.estimator.distributed import divide
from harness.estimator.settings import Settings
from harness.estimator.share import Share
from tests.harness.estimator.models import cross_entropy, num_terms, problem, split
from tests.processes import Process

from . import job
from .test_hessian import block_hessian

ROOT = Path(__file__).parents[3]
TIMINGS = ["seconds", "peak_bytes", "run_id"]


def torchrun(num_processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), "-m", "harness", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip


def started(num_processes: int, folder: Path, *arguments: object) -> list[Process]:
    """Start what torchrun would, without its agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(num_processes)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size}
    shared |= {"LOCAL_WORLD_SIZE": size}
    folder.mkdir(exist_ok=True)
    return [
        Process(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
        for rank in range(num_processes)
    ]


@pytest.fixture(scope="module", params=[2, 4])
def made(request, tmp_path_factory) -> Path:
    """Return the folder of what the job's processes made."""
    folder = tmp_path_factory.mktemp(f"job{request.param}")
    code = "from pathlib import Path; from tests.harness.estimator import job; "
    code += f"job.work(Path({str(folder)!r}))"
    for process in started(request.param, folder / "printed", code):
        ended, _, errors = process.communicate()
        assert ended == 0, errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", job.CASES)
def test_several_processes_make_the_rows_of_one(made, case):
    rows, expected = pd.read_pickle(made / f"{case}.pickle"), job.alone(case)
    order = ["block", "probe"]
    rows, expected = (
        frame.drop(columns=TIMINGS).sort_values(order).reset_index(drop=True)
        for frame in (rows, expected)
    )
    if job.CASES[case][1] == "probes":
        pd.testing.assert_frame_equal(rows, expected, check_exact=True, check_dtype=False)
        return
    rounded = ["alphas", "betas", "nodes", "weights", "microbatch_size"]
    pd.testing.assert_frame_equal(rows.drop(columns=rounded), expected.drop(columns=rounded))
    for row, other in zip(rows.itertuples(), expected.itertuples(), strict=True):
        scale = np.abs(other.nodes).max()
        # Lanczos amplifies rounding: 8 steps leave a good part of float64's 16 digits.
        np.testing.assert_allclose(row.nodes, other.nodes, atol=1e-7 * scale)
        first = slice(0, 3)
        np.testing.assert_allclose(row.alphas[first], other.alphas[first], atol=1e-12 * scale)


@pytest.mark.slow
def test_the_recorded_microbatch_is_the_largest_piece_that_was_computed(made):
    size = int(made.name.removeprefix("job")[0])
    rows = pd.read_pickle(made / "samples of uneven microbatches.pickle")
    assert set(rows["microbatch_size"]) == {4 // size}


@pytest.mark.slow
def test_the_gradient_is_summed_over_the_processes(made):
    model, batches, settings = job.inputs("samples of uneven microbatches")
    whole = block_hessian(
        model, cross_entropy, batches, settings["blocks"], batch_weights=num_terms
    )
    summed = torch.load(made / "gradient.pt")
    for name, gradient in whole.gradient().items():
        torch.testing.assert_close(summed[name], gradient)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1), (4, 3, 1), (2, 2, 2, 1)])
def test_the_shares_of_all_processes_are_the_batch(size, sizes):
    _, batch = problem("gpt", sum(sizes))
    batches = split(batch, sizes)
    weights = [num_terms(b) / num_terms(batch) for b in batches]
    shares = [Share(rank, size, lambda _: None) for rank in range(size)]
    pieces, parts = [], []
    for share in shares:
        mine, weights_of_mine = share.of(batches, weights, num_terms)
        pieces += mine
        parts += weights_of_mine
        most, largest = share.sizes(batches, cut=True)
        assert len(mine) <= most
        assert max((len(x) for x, _ in mine), default=0) <= largest
    assert sum(parts) == pytest.approx(1)
    np.testing.assert_allclose(parts, [num_terms(p) / num_terms(batch) for p in pieces])
    tokens = sorted(row.tolist() for x, _ in pieces for row in x)
    silent = [row.tolist() for row, y in zip(*batch, strict=True) if not (y != -100).any()]
    assert tokens == sorted(row.tolist() for row in batch[0] if row.tolist() not in silent)


def blocks_of(*sizes: int) -> list[Block]:
    return [Block(f"b{i}", "mlp", (), n, (n,)) for i, n in enumerate(sizes)]


def how(num_probes: int, num_steps: int) -> Settings:
    return Settings(num_probes=num_probes, num_steps=num_steps, memory_budget=1)


def cost_of(*flops: int, passes: int = 0, product_bytes: int = 0) -> Forecast:
    names = tuple(f"b{i}" for i in range(len(flops)))
    return Forecast(0, 0, passes, 0, flops, names, product_bytes=product_bytes)


def test_probes_are_divided_by_cost_and_blocks_stay_whole_but_at_the_cuts():
    blocks = blocks_of(2000, 2000, 500, 2000)
    parts = divide(cost_of(3, 1, 0, 4), blocks, how(4, 10), way="probes", size=2)
    assert parts == [
        {"b0": [0, 1, 2, 3], "b1": [0, 1, 2, 3]},
        {"b2": [0], "b3": [0, 1, 2, 3]},
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_probe_is_taken_by_one_process(size):
    blocks = blocks_of(5000, 100, 3000)
    parts = divide(cost_of(7, 2, 1), blocks, how(5, 10), way="probes", size=size)
    taken = sorted((name, p) for part in parts for name, probes in part.items() for p in probes)
    assert taken == sorted([("b1", 0), *((b, p) for b in ("b0", "b2") for p in range(5))])


@pytest.mark.parametrize(
    ("flops", "num_probes", "product_bytes", "shares_samples"),
    [
        (10**9, 10, 0, False),  # ten probes for two processes: nothing to gain by sums
        (10**9, 1, 0, True),  # one probe can't be divided
        (10**4, 1, 0, False),  # the sums would take longer than the products
        (10**9, 10, 2, True),  # no room for the graph: each process would make it at each step
    ],
)
def test_the_rule_picks_what_is_forecast_to_be_faster(
    flops, num_probes, product_bytes, shares_samples
):
    cost = cost_of(flops, passes=4 * flops, product_bytes=product_bytes)
    parts = divide(cost, blocks_of(5000), how(num_probes, 100), way="auto", size=2)
    assert (parts is None) == shares_samples


ENTRY = """
from dataclasses import replace
from harness.registry import get
demo = get("cnn-digits")
ENTRIES = (replace(demo, name="mine", options={"widths": (8, 16, 16, 16)}, recipe=None,
                   stages=("init",), full_stages=(), hessian_batch_size=63),)
"""


@pytest.fixture
def spectrum(tmp_path) -> Callable[[str], list[object]]:
    """Return what gives the arguments of a spectrum that takes a while."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mine.py").write_text(ENTRY)
    arguments = ["spectrum", "mine", "--num-probes", 3, "--num-steps", 60, "--device", "cpu"]
    arguments += ["--registry", tmp_path / "registry", "--out", tmp_path / "out", "--share"]
    return lambda way: [*arguments, way]


def wait_for_rows(out: Path, process: Process | subprocess.Popen[str]) -> None:
    path = out / "spectra" / "mine.parquet"
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)


def check_that_it_continues(out: Path, arguments: list[object]) -> None:
    """Run the same command again: what was finished is kept, the rest added."""
    some = spectra_db.load("spectra", source=out)
    assert set(some["status"]) <= {"ok", "zero"}
    assert not list(out.rglob("*.tmp"))
    leader, other = started(2, out.parent / "again", *arguments)
    assert other.communicate()[0] == 0
    code, output, errors = leader.communicate()
    assert code == 0, errors
    assert output.count("rows of") == 1
    rows = spectra_db.load("spectra", source=out)
    assert 0 < some["block"].nunique() < rows["block"].nunique()
    kept = rows.merge(some[["block", "probe", "seconds"]], on=["block", "probe", "seconds"])
    assert len(kept) == len(some)
    assert len(spectra_db.load("heterogeneity", source=out))


LOST = ("another process of the job was lost", "the same command continues")


@pytest.mark.slow
def test_a_killed_worker_of_torchrun_ends_the_job_with_a_clear_message_and_it_continues(
    tmp_path, spectrum
):
    process = torchrun(2, *spectrum("probes"))
    wait_for_rows(tmp_path / "out", process)
    os.kill(worker_of(process.pid, rank=1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert all(said in errors for said in LOST)
    assert "Signal 9 (SIGKILL)" in errors  # torchrun's, on which process it was
    check_that_it_continues(tmp_path / "out", spectrum("probes"))


def test_a_sum_that_lacks_a_killed_worker_ends_the_job_with_a_clear_message_and_it_continues(
    tmp_path, spectrum
):
    leader, other = started(2, tmp_path / "first", *spectrum("samples"))
    wait_for_rows(tmp_path / "out", leader)
    other.kill()
    code, _, errors = leader.communicate()
    assert code == 1
    assert all(said in errors for said in LOST)
    check_that_it_continues(tmp_path / "out", spectrum("samples"))


def test_commands_that_share_nothing_refuse_to_run_several_times(tmp_path):
    arguments = ("train", "cnn-digits", "--out", "/nowhere")
    code, _, errors = Process(arguments, {"WORLD_SIZE": "2", "RANK": "0"}, tmp_path).communicate()
    assert code == 2
    assert "only `spectrum` shares its work" in errors


def worker_of(agent: int, rank: int) -> int:
    """Return the process of a rank among the children of torchrun's agent."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")
