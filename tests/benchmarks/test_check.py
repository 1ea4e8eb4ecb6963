from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks import check

ROOT = Path(__file__).parents[2]
CONFIG = (ROOT / "asv.conf.json").read_text()
SUITE = """
import toy

class Cost:
    params = (["small", "large"],)

    def track_gflop(self, size):
        return toy.cost(size)

    track_gflop.unit = "GFLOP per step"

def track_error():
    return toy.error()
"""
PACKAGE = """
def error():
    return {error}

def cost(size):
    return {cost} if size == "small" else 100.0
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Path]:
    """Return a repository with a suite like ours, whose base is measured once."""
    root, before = tmp_path_factory.mktemp("repository"), check.measure
    (root / "benchmarks" / "suite").mkdir(parents=True)
    (root / "asv.conf.json").write_text(CONFIG)
    (root / "benchmarks" / "suite" / "__init__.py").touch()
    (root / "benchmarks" / "suite" / "toys.py").write_text(SUITE)
    (root / "toy.py").write_text(PACKAGE.format(cost="10.0", error="0.02"))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    of_base: dict[str, tuple[str, float | None]] = {}

    def measure(folder: Path, bench: str) -> dict[str, tuple[str, float | None]]:
        if folder == root:
            return before(folder, bench)
        of_base.update(of_base or before(folder, bench))
        return of_base

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # asv's file of the machine
        patch.chdir(root)
        patch.setattr(check, "measure", measure)
        subprocess.run([sys.executable, "-m", "asv", "machine", "--yes"], check=True)
        yield root


def compared(base: str = "HEAD") -> Result:
    return CliRunner().invoke(check.main, [base])


def test_a_planted_regression_and_a_benchmark_that_fails_now_are_worse_and_named(made):
    (made / "toy.py").write_text(PACKAGE.format(cost="10.2", error="1 / 0"))  # 2 % more operations
    result = compared()
    assert result.exit_code == 1, result.output
    cost, error = [line for line in result.stdout.splitlines() if "WORSE" in line]
    assert "toys.Cost.track_gflop('small')" in cost
    assert "1.020" in cost
    assert "toys.track_error" in error
    assert "failed, or gone" in error
    assert "2 of 3 tracked figures are worse" in result.stderr
    trees = subprocess.run(["git", "worktree", "list"], cwd=made, text=True, capture_output=True)
    assert len(trees.stdout.splitlines()) == 1


def test_what_is_the_same_or_better_or_within_rounding_passes(made):
    (made / "toy.py").write_text(PACKAGE.format(cost="9.0", error="0.0201"))
    result = compared()
    assert result.exit_code == 0, result.output
    assert "better" in result.stdout
    assert "none of 3" in result.stdout


@pytest.mark.usefixtures("made")
def test_a_base_that_is_no_commit_is_refused():
    result = compared("no-such-commit")
    assert result.exit_code == 2
    assert "no-such-commit" in result.stderr
