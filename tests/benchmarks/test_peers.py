from __future__ import annotations

import re

import pytest
import torch
from click.testing import CliRunner

from benchmarks import peers
from benchmarks.cases import entry
from harness import tasks
from harness.registry import get
from harness.training import load_problem


def test_a_model_of_the_registry_comes_with_its_hessians_batch_in_one_piece():
    problem = load_problem(get("gpt-pydoc"))
    [batch] = problem.batches
    again = problem.on(tasks.split(batch, 10)).whole
    for found in (entry("gpt-pydoc").batch, again):
        for tensor, expected in zip(found, batch, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_a_way_is_compared_with_ours_on_a_model_of_the_registry():
    done = CliRunner().invoke(
        peers.main,
        ["--case", "cnn-digits", "--way", "paper-algorithm", "--rounds", "1"],
    )
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if "cnn-digits" in line]
    assert [row[1].strip() for row in rows] == ["ours", "paper-algorithm"]
    assert float(rows[1][2]) >= float(rows[0][2])  # operations
    assert re.search(r"sgemm: \d+ GFLOP/s", done.output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "gpt-pydok"], "did you mean gpt-pydoc"),
        (["--case", "resnet18", "--way", "jax.linearize + jit"], "pass --case gpt-10m"),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments, said):
    done = CliRunner().invoke(peers.main, arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
