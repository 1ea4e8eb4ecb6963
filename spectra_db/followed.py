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
from spectra_db.verified import digest_of

_LIBRARIES = ("numpy", "pandas", "pyarrow", "scipy")


def note_of(root: Path, path: Path, made_by: Callable[..., Any]) -> Path | None:
    """Return where it is noted that a file follows from other tables.

    Args:
        root: Folder of tables.
        path: One of its files: of a model, which follows from the model's tables, or of all models.
        made_by: What makes its rows anew.

    Returns:
        The note, there or not; None where `made_by` is bound to more than tables, such as entries.
    """
    if not inspect.isfunction(made_by):
        return None
    of_model = digest_of(root, path.stem)
    tables = [of_model] if of_model else [*map(sha256_of, sorted(root.glob("*/*.parquet")))]
    what = [_code(), _code(made_by.__module__), path.parent.name, path.stem, tables]
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
def _code(module: str = __name__) -> list[str]:
    """Return the hashes of the modules of a module's package, and what they compute with."""
    package = sys.modules[module.partition(".")[0]]
    modules = [path for folder in package.__path__ for path in Path(folder).rglob("*.py")]
    return [*map(sha256_of, sorted(modules)), *map(version, _LIBRARIES)]
