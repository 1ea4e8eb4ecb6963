"""Files and folders written whole or not at all, and the hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

# Folder beside the tables: which version of an entry a model's rows are of.
NOTES = "entries"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield an empty file beside a path, which takes its place when it is written and on disk.

    Raises:
        OSError: The folder is not there, or can't be written to; what was at the path stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside another, which takes its place when the block ends.

    An error leaves what was there. So the files of a folder are of one writing always.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield staging
        _swap(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, out: Path) -> None:
    """Put a finished folder in the place of another, which is kept until the new one is there."""
    staging.chmod(0o755)
    if not out.exists():
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".old"))
    out.rename(old / out.name)
    try:
        staging.rename(out)
    except BaseException:
        (old / out.name).rename(out)
        raise
    shutil.rmtree(old)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, without what a killed process left of an earlier `whole` of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        for torn in path.parent.glob(f".{path.name}.*.tmp"):
            torn.unlink(missing_ok=True)
        yield


def read_notes(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is no file.

    Raises:
        ValueError: The file holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    notes = json.loads(text)
    if not isinstance(notes, dict):
        raise ValueError(f"{type(notes).__name__}, not an object")
    return notes


def write_notes(path: Path, notes: dict[str, Any]) -> None:
    """Write a JSON object, its names sorted."""
    with whole(path) as part:
        part.write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
