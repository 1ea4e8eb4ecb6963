from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a repository with a suite like ours, and a function that changes its package."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # asv's file of the machine
    root = tmp_path / "repository"
    (root / "benchmarks" / "suite").mkdir(parents=True)
    (root / "asv.conf.json").write_text(CONFIG)
    (root / "benchmarks" / "suite" / "__init__.py").touch()
    (root / "benchmarks" / "suite" / "toys.py").write_text(SUITE)

    def change(cost: str = "10.0", error: str = "0.02") -> None:
        (root / "toy.py").write_text(PACKAGE.format(cost=cost, error=error))

    change()
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "asv", "machine", "--yes"], cwd=root, check=True)
    return root, change


def check(root: Path, base: str = "HEAD") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "check.py"), base],
        cwd=root,
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_planted_regression_and_a_benchmark_that_fails_now_are_worse_and_named(repository):
    root, change = repository
    change(cost="10.2", error="1 / 0")  # 2 % more operations
    result = check(root)
    assert result.returncode == 1, result.stdout + result.stderr
    cost, error = [line for line in result.stdout.splitlines() if "WORSE" in line]
    assert "toys.Cost.track_gflop('small')" in cost
    assert "1.020" in cost
    assert "toys.track_error" in error
    assert "failed, or gone" in error
    assert "2 of 3 tracked figures are worse" in result.stderr
    trees = subprocess.run(["git", "worktree", "list"], cwd=root, text=True, capture_output=True)
    assert len(trees.stdout.splitlines()) == 1


def test_what_is_the_same_or_better_or_within_rounding_passes(repository):
    root, change = repository
    change(cost="9.0", error="0.0201")
    result = check(root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "better" in result.stdout
    assert "none of 3" in result.stdout


def test_a_base_that_is_no_commit_is_refused(repository):
    root, _ = repository
    result = check(root, "no-such-commit")
    assert result.returncode == 2
    assert "no-such-commit" in result.stderr
