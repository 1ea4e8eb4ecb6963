"""Which files were found to follow from others: notes in the user's cache, bound to the bytes.

Making a release's metrics anew takes minutes, and most of its files are those of the release
before. A note is an empty file whose name is the hash of all that its finding depends on: the
tables, the code that makes them anew and the libraries'. Another byte of any has another name.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectra_db.files import sha256_of
from spectra_db.schema import TABLES
from spectra_db.verified import digest_of

_LIBRARIES = ("numpy", "pandas", "pyarrow", "scipy")


def note_of(root: Path, path: Path, made_by: Callable[..., Any]) -> Path | None:
    """Return where it is noted that a file follows from other tables.

    Args:
        root: Folder of tables.
        path: One of its files: of a model, which follows from the model's tables, or of all models.
        made_by: What makes its rows anew.

    Returns:
        The note, there or not; None where `made_by` is bound to more than tables, such as entries:
        it is no function of a package, or one that closes over values.
    """
    if not inspect.isfunction(made_by) or made_by.__closure__:
        return None
    packages = {name.partition(".")[0] for name in (__name__, made_by.__module__)}
    if not all(hasattr(sys.modules[package], "__path__") for package in packages):
        return None
    has_model = "model" in TABLES[path.parent.name].names
    of_model = digest_of(root, path.stem) if has_model else None
    tables = [of_model] if of_model else [*map(sha256_of, sorted(root.glob("*/*.parquet")))]
    what = [*map(_code, sorted(packages)), path.parent.name, path.stem, tables]
    name = sha256(json.dumps(what).encode()).hexdigest()
    cached = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cached, "hessian-spectra", "followed", name)


def is_there(note: Path) -> bool:
    """Tell whether a note was left; in a cache that can't be read there is none."""
    return os.path.exists(note)  # Path.exists raises where a folder is closed


def write(note: Path) -> None:
    """Leave a note; where the cache can't be written to, there is none."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


@cache
def _code(package: str) -> list[str]:
    """Return the hashes of a package's modules, and the versions of what they compute with."""
    folders = sys.modules[package].__path__
    modules = [path for folder in folders for path in Path(folder).rglob("*.py")]
    return [*map(sha256_of, sorted(modules)), *map(version, _LIBRARIES)]
