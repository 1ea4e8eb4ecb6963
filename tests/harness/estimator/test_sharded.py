"""Spectra of models that several processes hold together, against those of the whole model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harness.estimator.blocks import Part
from harness.estimator.shards import LocalPart

from .sharded_job import CASES, ERRORS, alone
from .test_distributed import ROOT, TIMINGS, started

PROGRAM = re.search(
    r"```python\n# sharded\.py\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.S
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[int], Path]:
    """Return what gives the folder of what so many processes made, who start once."""

    @cache
    def of(size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"sharded{size}")
        code = "import os; from pathlib import Path; from tests.harness.estimator.sharded_job "
        code += f"import work; os.chdir({str(folder)!r}); work(Path.cwd(), {PROGRAM[1]!r})"
        for process in started(size, folder / "printed", code):
            ended, _, errors = process.communicate()
            assert ended == 0, errors
        return folder

    return of


def facts(folder: Path, name: str) -> list:
    """Return what each process says."""
    paths = sorted(folder.glob("?.json"))
    return [json.loads(path.read_text())[name] for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "case"), [(size, case) for size, cases in CASES.items() for case in cases]
)
def test_rows_are_those_of_one_process_within_the_stated_error(made, size, case):
    first, *others = (
        pd.read_pickle(made(size) / f"{case}-{rank}.pickle").drop(columns=TIMINGS)
        for rank in range(size)
    )
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_exact=True)
    expected = alone(case).drop(columns=TIMINGS)
    rounded = ["alphas", "betas", "nodes", "weights", "product_error", "microbatch_size"]
    pd.testing.assert_frame_equal(first.drop(columns=rounded), expected.drop(columns=rounded))
    for row, one in zip(first.itertuples(), expected.itertuples(), strict=True):
        error = row.product_error + one.product_error
        assert error < 1e-5
        scale = np.abs(one.nodes).max()
        # Few steps amplify what products differ by little.
        np.testing.assert_allclose(row.nodes, one.nodes, atol=10 * error * scale)
        np.testing.assert_allclose(row.alphas[:2], one.alphas[:2], atol=2 * error * scale)


@pytest.mark.parametrize("size", CASES)
def test_the_model_is_as_it_was_bit_for_bit(made, size):
    for changed in facts(made(size), "changed"):
        assert changed == {case: [] for case in CASES[size]}


@pytest.mark.parametrize(("size", "rows"), [(2, [2, 1]), (4, [1, 1, 1, 0])])
def test_a_process_keeps_its_shard_of_vectors(made, size, rows):
    sizes = facts(made(size), "sizes")
    for name in ("1.weight", "3.weight"):
        (whole,) = {of[name][0] for of in sizes}
        probes, products = ([of[name][i] for of in sizes] for i in (1, 2))
        assert probes == products
        assert sum(probes) == whole
    assert [of["1.weight"][1] // 36 for of in sizes] == rows


@pytest.mark.parametrize("name", ERRORS)
def test_what_can_not_be_had_is_said_in_all_processes(made, name):
    for said in facts(made(2), "errors"):
        assert said[name].startswith(ERRORS[name])


def test_the_program_of_the_documentation_leaves_rows(made):
    rows = pd.read_parquet(made(2) / "rows.parquet")
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
