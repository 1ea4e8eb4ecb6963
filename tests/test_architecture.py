"""The arrows of the design: imports point one way, at the top of a module and inside functions."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In the order of the data: a folder may import those before it.
FOLDERS = (
    "registry", "tasks", "estimator", "training", "records", "campaign", "predictors",
    "leaderboard", "submission", "paper", "cli",
)  # fmt: skip
# The estimator takes any model: it knows no entries and no data sets.
FORBIDDEN = {"estimator": {"registry", "tasks"}}
# From Parquet to page no torch; networks are what entries import when they build.
NO_TORCH = ("spectra_db", "harness/registry", "harness/leaderboard", "harness/cli")
NETWORKS = "harness/registry/networks"


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Yield what a file imports, in functions and for types too; `top`: only as it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree) if top else ():
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing or lazy:
            skipped.update(child for part in node.body for child in ast.walk(part))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Return what each module of ours imports: modules of ours by their names, packages else."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in [*_files("harness"), *_files("spectra_db")]
    }

    def named(module: str) -> str:
        """Return the module that a name is, or is in."""
        inside = module.rpartition(".")[0]
        return next((m for m in (module, inside) if m in paths), _package(module))

    return {name: {named(m) for m in _imports(path)} - {name} for name, path in paths.items()}


def _package(module: str) -> str:
    return module.partition(".")[0]


def _folder(module: str) -> str:
    return module.split(".")[1] if module.startswith("harness.") else ""


@pytest.mark.parametrize("path", _files("spectra_db"), ids=lambda path: path.name)
def test_the_dataset_knows_neither_torch_nor_the_harness(path):
    assert not {"torch", "harness", "benchmarks", "tests"} & set(map(_package, _imports(path)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_harness_imports_only_folders_before_it(folder):
    later = set(FOLDERS[FOLDERS.index(folder) + 1 :]) | FORBIDDEN.get(folder, set())
    for path in _files(f"harness/{folder}"):
        wrong = [m for m in _imports(path) if _folder(m) in later]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_every_folder_has_its_place_in_the_order():
    folders = {path.parent.name for path in (ROOT / "harness").glob("*/__init__.py")}
    assert folders == set(FOLDERS)
    loose = {path.stem for path in (ROOT / "harness").glob("*.py")}
    assert loose == {"__init__", "__main__", "errors"}


@pytest.mark.parametrize("path", _files("benchmarks"), ids=lambda path: path.name)
def test_every_benchmark_module_imports(path):
    """Also what asv alone loads: a name that is gone would stay unseen until somebody measures."""
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_the_harness_imports_neither_benchmarks_nor_tests():
    for path in _files("harness"):
        assert not {"benchmarks", "tests"} & set(map(_package, _imports(path)))


def test_no_module_imports_one_that_imports_it(imports):
    TopologicalSorter(imports).prepare()  # raises CycleError, with the circle


def test_the_pages_reach_torch_by_the_building_of_an_entry_alone(imports):
    reached = {name for name in imports if name.startswith("harness.leaderboard")}
    while more := {m for name in reached for m in imports[name] if m in imports} - reached:
        reached |= more
    heavy = {"torch", "timm", "transformers", "torchvision"}
    assert {name for name in reached if heavy & imports[name]} == {"harness.registry.entry"}


@pytest.mark.parametrize("path", ["harness/estimator/lanczos.py", "spectra_db/quadrature.py"])
def test_the_algorithms_import_nothing_of_ours(path):
    path = ROOT / path
    assert not {"harness", "spectra_db"} & set(map(_package, _imports(path)))


@pytest.mark.parametrize("place", NO_TORCH)
def test_no_torch_is_imported_from_parquet_to_page(place):
    for path in _files(place):
        if ROOT / NETWORKS not in path.parents:
            assert "torch" not in set(map(_package, _imports(path, top=True))), path


def test_it_takes_no_torch():
    codes = [
        "import spectra_db.plot",
        "import harness",
        "from harness.registry import entries; entries()",
        "from harness.tasks import names; names()",
        "import harness.training.grid, harness.training.gap",
        "import harness.leaderboard.site, harness.leaderboard.board",
    ]
    heavy = {"torch", "timm", "transformers", "torchvision"}
    # In one process: what one imports, the next ones have; the first with torch is named.
    lines = [f"{code}; assert not {heavy} & set(sys.modules), {code!r}" for code in codes]
    code = "\n".join(["import sys", *lines])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_no_span_of_time_is_read_off_a_clock_that_jumps():
    paths = [*_files("harness"), *_files("spectra_db")]
    assert not [path for path in paths if "time.time" in set(_names(path))]


def _names(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file uses, and what it imports."""
    yield from _imports(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
