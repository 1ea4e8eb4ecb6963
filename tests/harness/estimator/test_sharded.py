"""Spectra of models that several processes hold together, against those of the whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harness.estimator.blocks import Part
from harness.estimator.shards import LocalPart

from . import sharded_job
from .test_distributed import ROOT, TIMINGS, started

PROGRAM = re.search(
    r"```python\n# sharded\.py\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.S
)


@pytest.fixture(scope="module", params=[2, 4])
def made(request, tmp_path_factory) -> tuple[Path, int]:
    """Return the folder of what the job's processes made, and how many they were."""
    folder = tmp_path_factory.mktemp(f"sharded{request.param}")
    code = "import os; from pathlib import Path; from tests.harness.estimator import sharded_job; "
    code += f"os.chdir({str(folder)!r}); sharded_job.work(Path({str(folder)!r}), {PROGRAM[1]!r})"
    processes = started(request.param, folder / "printed", code)
    for process in processes:
        ended, _, errors = process.communicate()
        assert ended == 0, errors
    return folder, request.param


def facts(made: tuple[Path, int], name: str) -> list:
    """Return what each process says."""
    folder, size = made
    return [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(size)]


@pytest.mark.parametrize("case", sharded_job.CASES)
def test_rows_are_those_of_one_process_within_the_stated_error(made, case):
    folder, size = made
    first, *others = (
        pd.read_pickle(folder / f"{case}-{rank}.pickle").drop(columns=TIMINGS)
        for rank in range(size)
    )
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_exact=True)
    expected = sharded_job.alone(case).drop(columns=TIMINGS)
    rounded = ["alphas", "betas", "nodes", "weights", "product_error", "microbatch_size"]
    pd.testing.assert_frame_equal(first.drop(columns=rounded), expected.drop(columns=rounded))
    for row, one in zip(first.itertuples(), expected.itertuples(), strict=True):
        error = row.product_error + one.product_error
        assert error < 1e-5
        scale = np.abs(one.nodes).max()
        # Few steps amplify what products differ by little.
        np.testing.assert_allclose(row.nodes, one.nodes, atol=10 * error * scale)
        np.testing.assert_allclose(row.alphas[:2], one.alphas[:2], atol=2 * error * scale)


def test_the_model_is_as_it_was_bit_for_bit(made):
    for changed in facts(made, "changed"):
        assert changed == {case: [] for case in sharded_job.CASES}


def test_a_process_keeps_its_shard_of_vectors(made):
    sizes = facts(made, "sizes")
    for name in ("1.weight", "3.weight"):
        (whole,) = {of[name][0] for of in sizes}
        probes, products = ([of[name][i] for of in sizes] for i in (1, 2))
        assert probes == products
        assert sum(probes) == whole
    rows = [of["1.weight"][1] // 36 for of in sizes]
    assert rows == {2: [2, 1], 4: [1, 1, 1, 0]}[len(sizes)]


@pytest.mark.parametrize("name", sharded_job.ERRORS)
def test_what_can_not_be_had_is_said_in_all_processes(made, name):
    for said in facts(made, "errors"):
        assert said[name].startswith(sharded_job.ERRORS[name])


def test_the_program_of_the_documentation_leaves_rows(made):
    rows = pd.read_parquet(made[0] / "rows.parquet")
    assert set(rows["product"]) == {"differences"}
    assert set(rows["status"]) == {"ok"}


@pytest.mark.parametrize(
    "part", [Part("p"), Part("p", 0, 2, 5), Part("p", 1, 0, 2), Part("p", -2, 0, 1)]
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_shards_of_a_part_are_the_part(part, dim, size):
    whole = torch.arange(30.0).view(6, 5)
    values, found, first = part.of(whole), [], 0
    for shard in (*whole.chunk(size, dim), whole.narrow(dim, whole.shape[dim], 0)):
        mine = LocalPart(part, tuple(values.shape), dim, first, first := first + shard.shape[dim])
        assert torch.equal(mine.of(shard), mine.of_whole(values))
        found.append(mine.of(shard))
    assert torch.equal(torch.cat(found, dim), values)
