"""The sections of the reproduction, by the names that `harness paper` takes.

A section reads the dataset or computes, and leaves a JSON file and figures; `page` makes
docs/paper.md of the JSON files. A long section is measured unit by unit, each unit kept as a JSON
file of its own, so that it goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError
from harness.paper import page
from harness.paper.release import Source
from harness.paper.result import Result, save, write_json
from spectra_db import plot


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        function: "module:function" below harness.paper; takes the source and returns a Result. Of
            a long section the module alone, with `units`, `forecast`, `measure`, `summarise`.
        title: What it shows.
        is_long: It is measured when it is named, and drawn from what was measured otherwise.
    """

    function: str
    title: str
    is_long: bool = False


SECTIONS = {
    "fig1": Section("figures:fig1", "full spectra of CNNs and Transformers"),
    "fig2": Section("blockdiagonal:fig2", "exact Hessians of tiny Transformers"),
    "blockdiagonal": Section(
        "blockdiagonal", "how nearly block diagonal small models' Hessians are", is_long=True
    ),
    "fig3": Section("figures:fig3", "spectra of four blocks of a CNN and of a Transformer"),
    "fig4": Section("figures:fig4", "JS distances between blocks"),
    "table1": Section("figures:table1", "JS⁰ of the paper's systems"),
    "fig5": Section("figures:fig5", "the sweep of perceptrons"),
    "sweep": Section(
        "sweep", "the perceptrons again, with learning rates free downwards", is_long=True
    ),
    "fig6": Section("figures:fig6", "a pretrained GPT and one from scratch"),
    "fig7": Section("figures:fig7", "the SGD-Adam gap against JS⁰"),
    "fig9": Section("figures:fig9", "training curves of CNNs"),
    "fig10": Section("figures:fig10", "training curves of Transformers"),
    "fig14": Section("figures:fig14", "training curves of the scaled perceptrons"),
    "fig8": Section("models:fig8", "gradient descent and Adam on the quadratic models"),
    "fig12": Section("models:fig12", "eigenvalues of case 1"),
    "fig13": Section("models:fig13", "eigenvalues of case 2"),
    "theory": Section("models:check_theory", "Propositions 1 and 2, Theorem 1"),
    "table2": Section("models:table2", "steps against the condition number"),
    "causal": Section("causal", "SGD with a learning rate per block", is_long=True),
    "slq": Section("models:slq", "errors of stochastic Lanczos quadrature"),
}
TITLES = {name: section.title for name, section in SECTIONS.items()}

# Tells what is about to be measured; and then of each unit.
OnUnit = Callable[[str], None]


def run(name: str, source: Source, out: Path) -> Result:
    """Make a section's numbers and figures in OUT/paper, and the page OUT/paper.md.

    A long section is drawn from what `measure` left.

    Raises:
        UserError: There is no such section, or the folder can't be written to.
    """
    section, code = _section(name), code_of(name)
    with plot.style():
        if section.is_long:
            try:
                result: Result = code.summarise(_records(name, out), source)
            except (KeyError, TypeError) as error:
                folder = out / "paper" / name
                raise UserError(f"{folder} holds what is no measurement; delete it") from error
        else:
            result = getattr(code, section.function.partition(":")[2])(source)
        save(name, result, out / "paper")
    page.write(out, TITLES)
    return result


def measure(name: str, source: Source, out: Path, data_root: Path | None, on_unit: OnUnit) -> None:
    """Measure what is missing of a long section, a file OUT/paper/NAME/UNIT.json each.

    Args:
        name: Of a long section.
        source: Tables; trained weights are looked for in its folder `checkpoints`.
        out: As `run`.
        data_root: See `harness.tasks`.
        on_unit: Called with the forecast, then with each unit's name before it is measured.
    """
    code = code_of(name)
    todo = [unit for unit in code.units(source) if not _path(name, unit, out).is_file()]
    if todo:
        on_unit(f"{name}: {len(todo)} to measure, {code.forecast(todo, data_root)}")
    for unit in todo:
        on_unit(f"{name}: {unit}")
        record = code.measure(unit, source, data_root)
        try:
            write_json(_path(name, unit, out), record)
        except OSError as error:
            raise UserError(f"{out} can't be written to: {error.strerror}") from error


def code_of(name: str) -> ModuleType:
    """Import the module of a section."""
    return import_module(f"harness.paper.{_section(name).function.partition(':')[0]}")


def _section(name: str) -> Section:
    if name not in SECTIONS:
        raise UserError(f"no section {name!r}; choose from {', '.join(SECTIONS)}")
    return SECTIONS[name]


def _path(name: str, unit: str, out: Path) -> Path:
    return out / "paper" / name / f"{unit}.json"


def _records(name: str, out: Path) -> dict[str, Any]:
    """Read what was measured of a long section, by unit."""
    records = {}
    for path in sorted((out / "paper" / name).glob("*.json")):
        try:
            records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not a measurement; delete it") from error
    return records
