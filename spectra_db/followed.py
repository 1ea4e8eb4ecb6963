"""Which files were found to follow from others: notes in the user's cache, bound to the bytes.

Making a release's metrics anew takes minutes, and most of its files are those of the release
before. A note is an empty file whose name is the hash of all that its finding depends on: the
model's tables, this package's code and the libraries'. Another byte of any has another name.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from spectra_db.files import sha256_of
from spectra_db.verified import digest_of

_LIBRARIES = ("numpy", "pandas", "pyarrow", "scipy")


def note_of(root: Path, table: str, model: str) -> Path | None:
    """Return where it is noted that a file follows from the model's other tables.

    Args:
        root: Folder of tables.
        table: The file's table.
        model: Its model.

    Returns:
        The note, there or not; None where the model has no spectra.
    """
    tables = digest_of(root, model)
    if tables is None:
        return None
    name = sha256(json.dumps([_code(), table, model, tables]).encode()).hexdigest()
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
def _code() -> list[str]:
    """Return the hashes of this package's modules, and the versions of what they compute with."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [*map(sha256_of, modules), *map(version, _LIBRARIES)]
