"""The registry: the models of the dataset, one file per family. Imports no torch."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path

from harness.errors import UserError, one_line
from harness.registry.entry import ModelEntry, Recipe
from spectra_db.errors import hint
from spectra_db.words import TIERS

__all__ = [
    "MAX_BYTES",
    "SUBMITTED",
    "ModelEntry",
    "Recipe",
    "defines_entries",
    "entries",
    "get",
    "make_importable",
]

# Entries that were submitted, one file each, as `harness add-model` writes them.
SUBMITTED = Path(__file__).parent / "submitted"
MAX_BYTES = 1 << 20  # of a file of code, which someone has to review


def entries(tier: str | None = None, *, registry_dir: Path | str | None = None) -> list[ModelEntry]:
    """List the entries by tier and name.

    Args:
        tier: demo, small, paper, ranked or reference; None for all.
        registry_dir: Folder of further entry files (Python); those that define ENTRIES are
            executed, so name only a folder you trust.

    Raises:
        UserError: Unknown tier, an entry file that fails, or two entries of one name.
    """
    if tier is not None and tier not in TIERS:
        raise UserError(f"unknown tier {tier!r}; choose one of {', '.join(TIERS)}")
    found = [*_ours(), *_read_folder(SUBMITTED)]
    if registry_dir is not None:
        folder = Path(registry_dir)
        if not folder.is_dir():
            raise UserError(f"--registry {folder} is not a folder")
        make_importable(folder)  # for networks in files beside the entries
        found += _read_folder(folder)
    names = [entry.name for entry in found]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(f"two entries are named {doubles[0]!r}; rename one")
    chosen = [entry for entry in found if tier in (None, entry.tier)]
    return sorted(chosen, key=lambda entry: (TIERS.index(entry.tier), entry.name))


@cache
def _ours() -> tuple[ModelEntry, ...]:
    """Gather the entries of this folder's modules."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(entry for module in modules for entry in getattr(module, "ENTRIES", ()))


def get(name: str, *, registry_dir: Path | str | None = None) -> ModelEntry:
    """Return the entry of that name.

    Raises:
        UserError: There is none; names close matches.
    """
    known = {entry.name: entry for entry in entries(registry_dir=registry_dir)}
    if name in known:
        return known[name]
    raise UserError(f"unknown model {name!r}; {hint(name, known, 'see `harness list`')}")


def make_importable(folder: Path) -> None:
    """Let the modules of a folder be imported, after what is installed, and write nothing there.

    Compiled files beside them would be code that a submission does not list.
    """
    sys.dont_write_bytecode = True
    if (here := str(folder.resolve())) not in sys.path:
        sys.path.append(here)


def defines_entries(path: Path) -> bool:
    """Tell whether a Python file defines ENTRIES, without executing it.

    Raises:
        UserError: It is no Python, too large, or nested too deeply to be read.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a file of entries has at most {MAX_BYTES:,}")
    try:
        body = ast.parse(path.read_bytes(), str(path)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from error
    names = {n.id for node in body for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {a.asname or a.name for n in body if isinstance(n, ast.ImportFrom) for a in n.names}
    return "ENTRIES" in names


def _read_folder(folder: Path) -> list[ModelEntry]:
    """Execute the Python files of a folder that define entries, and gather these."""
    found: list[ModelEntry] = []
    for path in sorted(folder.glob("*.py")):
        # What doesn't even name them may be no Python of this version: not the registry's matter.
        if b"ENTRIES" not in path.read_bytes() or not defines_entries(path):
            continue
        spec = importlib.util.spec_from_file_location(f"harness_registry_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            strange = [entry for entry in module.ENTRIES if not isinstance(entry, ModelEntry)]
            if strange:
                raise UserError(f"{path}: ENTRIES holds {strange[0]!r}, which is no ModelEntry")
            found += module.ENTRIES
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} can't be read: {one_line(error)}") from error
    return found
