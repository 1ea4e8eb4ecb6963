"""Whether what the suite tracks got worse since a commit: `make bench-check BASE=commit`.

Runs what the suite tracks (track_: operations, products, errors, a share of processor time) of the
working tree and of the base, which is checked out beside it, by the same Python, and fails where
one is worse: of all of them lower is better. (`asv compare` never fails, and `asv continuous` would
install each commit into an environment of its own, torch included.)
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from asv.results import iter_results
from rich.console import Console
from rich.table import Table

# Counts are the same on every machine; errors of estimates move when sums are ordered otherwise,
# and shares of processor time are not the same twice.
TOLERANCES = {"GFLOP per step": 1.01, "of the processor time of the paper's algorithm": 1.5}
TOLERANCE = 1.1
Measured = dict[str, tuple[str, float | None]]  # unit and value by name


@dataclass(frozen=True)
class Change:
    """One benchmark at the base and now; None where it is missing or failed."""

    name: str
    unit: str
    base: float | None
    now: float | None

    @property
    def verdict(self) -> str:
        """Say whether it is worse: lower is better."""
        if self.base is None:
            return "new" if self.now is not None else "failed before and now"
        if self.now is None:
            return "WORSE: failed, or gone"
        allowed = TOLERANCES.get(self.unit, TOLERANCE)
        if self.now > self.base * allowed:
            return "WORSE"
        return "better" if self.now * allowed < self.base else "same"


def measure(root: Path, bench: str) -> Measured:
    """Run the benchmarks of a checkout by this Python; return unit and value by name.

    Raises:
        click.ClickException: asv failed; its output stands above.
    """
    config = json.loads((root / "asv.conf.json").read_text())
    with tempfile.TemporaryDirectory() as results:
        config |= {"repo": str(root), "results_dir": results}
        config["benchmark_dir"] = str(root / config["benchmark_dir"])
        file = Path(results) / "asv.conf.json"
        file.write_text(json.dumps(config))
        python = f"existing:{sys.executable}"
        command = [sys.executable, "-m", "asv", "run", "--config", str(file), "--quick"]
        command += ["--environment", python, "--set-commit-hash", _git(root, "rev-parse", "HEAD")]
        command += ["--bench", bench, "--show-stderr"]
        # The checkout's own packages come before what is installed.
        paths = {"PYTHONPATH": str(root), "ASV_PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=os.environ | paths, text=True, capture_output=True, check=False
        )
        found = list(iter_results(results))
        if not found:
            raise click.ClickException(f"asv failed in {root}:\n{done.stdout}{done.stderr}")
        names = json.loads((Path(results) / "benchmarks.json").read_text())
        values: Measured = {}
        for result in found:
            for key in result.get_all_result_keys():
                params = result.get_result_params(key)
                numbers = result.get_result_value(key, params)
                for words, value in zip(itertools.product(*params), numbers, strict=True):
                    name = f"{key}({', '.join(words)})" if words else key
                    unit = names.get(key, {}).get("unit", "")
                    good = value is not None and value == value
                    values[name] = (unit, float(value) if good else None)
    return values


def compare(base: Measured, now: Measured) -> list[Change]:
    """Put what was measured of two checkouts side by side."""
    missing = ("", None)
    return [
        Change(name, unit, base.get(name, missing)[1], now.get(name, missing)[1])
        for name, (unit, _) in sorted((base | now).items())
    ]


def show(changes: list[Change]) -> None:
    """Print a comparison."""
    table = Table("benchmark", "unit")
    for column in ("base", "now", "now / base"):
        table.add_column(column, justify="right")
    table.add_column("")
    for c in changes:
        ratio = f"{c.now / c.base:.3f}" if c.now is not None and c.base else "–"
        numbers = ["–" if x is None else f"{x:.4g}" for x in (c.base, c.now)]
        table.add_row(c.name, c.unit, *numbers, ratio, c.verdict)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def _git(root: Path, *arguments: str) -> str:
    """Run git and return its answer, or fail with what it said."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, text=True, capture_output=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise click.UsageError(f"git {' '.join(arguments)} in {root}: {said}")
    return done.stdout.strip()


@click.command()
@click.argument("base")
@click.option("--bench", default="track_", show_default=True, help="Benchmarks, as a regex.")
def main(base: str, bench: str) -> None:
    """Compare the tracked figures of the working tree with those of commit BASE."""
    here = Path.cwd()
    commit = _git(here, "rev-parse", "--verify", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "base"
        _git(here, "worktree", "add", "--quiet", "--detach", str(there), commit)
        try:
            changes = compare(measure(there, bench), measure(here, bench))
        finally:
            _git(here, "worktree", "remove", "--force", str(there))
    show(changes)
    worse = [change for change in changes if change.verdict.startswith("WORSE")]
    if worse:
        click.echo(
            f"{len(worse)} of {len(changes)} tracked figures are worse than at {base}", err=True
        )
        sys.exit(1)
    click.echo(f"none of {len(changes)} tracked figures is worse than at {base}")


if __name__ == "__main__":
    main()
