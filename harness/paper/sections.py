"""The sections of the reproduction, by the names that `harness paper` takes.

A section reads the dataset or computes, and leaves a JSON file and figures; `page` makes
docs/paper.md of the JSON files.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from harness.errors import UserError
from harness.paper import page
from harness.paper.release import Source
from harness.paper.result import Result, save


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        function: "module:function" below harness.paper; takes the source and returns a Result.
        title: What it shows.
    """

    function: str
    title: str


SECTIONS = {
    "fig8": Section("models:fig8", "gradient descent and Adam on the quadratic models"),
    "fig12": Section("models:fig12", "eigenvalues of case 1"),
    "fig13": Section("models:fig13", "eigenvalues of case 2"),
    "theory": Section("models:check_theory", "Propositions 1 and 2, Theorem 1"),
    "table2": Section("models:table2", "steps against the condition number"),
    "slq": Section("models:slq", "errors of stochastic Lanczos quadrature"),
}


def run(name: str, source: Source, out: Path) -> Result:
    """Compute a section and write its numbers and figures to OUT/paper, and the page OUT/paper.md.

    Raises:
        UserError: There is no such section.
    """
    if name not in SECTIONS:
        raise UserError(f"no section {name!r} of the paper; choose from {', '.join(SECTIONS)}")
    module, _, function = SECTIONS[name].function.partition(":")
    result: Result = getattr(import_module(f"harness.paper.{module}"), function)(source)
    save(name, result, out / "paper")
    page.write(out)
    return result
