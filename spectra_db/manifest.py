"""The manifest of a release: its version, and the sha256 of every file.

A folder with a `manifest.json` is a release; a folder of tables without one is work in progress.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from spectra_db.errors import DatasetError, first_line
from spectra_db.files import sha256_of, whole
from spectra_db.schema import PROTOCOL_VERSION, TABLES
from spectra_db.words import SLUG

NAME = "manifest.json"
CARD, CHANGELOG = "README.md", "CHANGELOG.md"
# Beside tables: what `harness verify` leaves; and CSV files, which releases before 0.10.1 hold.
_NOTES = r"README\.md|CHANGELOG\.md|verified\.json|leaderboard/[a-z0-9_-]+\.csv"
_NAMES = "|".join(TABLES)
_TABLE = re.compile(rf"(?:{_NAMES})/{SLUG.pattern}\.parquet")
_MERGED = rf"merged/(?:(?:overview|{_NAMES})\.parquet|spectra\.png)"  # see merged.py
_FILE = re.compile(rf"(?:{_NOTES}|{_MERGED}|{_TABLE.pattern})")
_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 24  # a manifest of 100,000 files has as much


class InvalidRelease(DatasetError):  # noqa: N818
    """A release that is not what its manifest says; the text names the file and the reason."""


@dataclass(frozen=True)
class File:
    """One file of a release.

    Attributes:
        sha256: Of its bytes, 64 hex digits.
        bytes: Its size.
        rows: Rows of a table; None for text and for what is merged of tables.
    """

    sha256: str
    bytes: int
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a release holds.

    Attributes:
        version: MAJOR.MINOR.PATCH of the data.
        protocol_version: Of its spectra; `schema.VERSIONS` are those of tables of their own.
        files: Relative path, with '/', to the file; all files but the manifest.
    """

    version: str
    protocol_version: int
    files: Mapping[str, File]

    def models(self) -> list[str]:
        """Return the models, by name."""
        return [Path(path).stem for path in sorted(self.files) if path.startswith("models/")]

    def rows(self) -> dict[str, int]:
        """Return the number of rows per table that there is."""
        counts: Counter[str] = Counter()
        for path, file in self.files.items():
            if file.rows is not None:
                counts[path.partition("/")[0]] += file.rows
        return {table: counts[table] for table in TABLES if table in counts}


def version_of(text: str) -> tuple[int, int, int]:
    """Return (major, minor, patch) of a version.

    Raises:
        InvalidRelease: It is not like 1.2.3.
    """
    found = _VERSION.fullmatch(text)
    if found is None:
        raise InvalidRelease(f"version {text!r} is not like 1.2.3 (MAJOR.MINOR.PATCH)")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


def belongs(path: str) -> bool:
    """Tell whether a relative path is one of a release's files."""
    return _FILE.fullmatch(path) is not None


def is_table(path: str) -> bool:
    """Tell whether a relative path is that of a model's rows of a table."""
    return _TABLE.fullmatch(path) is not None


def describe(path: Path, rows: int | None = None) -> File:
    """Return a file's entry."""
    return File(sha256_of(path), path.stat().st_size, rows)


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None where there is none.

    Raises:
        InvalidRelease: It is not one of ours, or of another protocol.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRelease(f"{path}: {first_line(error)}") from error


@lru_cache(maxsize=4)
def _parse(text: str) -> Manifest:
    content = json.loads(text)
    if not isinstance(content, dict) or set(content) != {"version", "protocol_version", "files"}:
        raise InvalidRelease("a manifest has version, protocol_version and files")
    version, protocol, files = (content[k] for k in ("version", "protocol_version", "files"))
    version_of(str(version))
    if protocol != PROTOCOL_VERSION:
        raise InvalidRelease(f"protocol {protocol!r}; this code reads {PROTOCOL_VERSION} alone")
    if not isinstance(files, dict):
        raise InvalidRelease("files is no object")
    entries = {}
    for path, entry in files.items():
        if not belongs(path):
            raise InvalidRelease(f"{path[:200]!r} is no file of a release")
        try:
            file = File(**entry)
        except TypeError:
            raise InvalidRelease(f"{path}: an entry has sha256, bytes and rows") from None
        sizes = [file.bytes, *([] if file.rows is None else [file.rows])]
        if not (isinstance(file.sha256, str) and _SHA256.fullmatch(file.sha256)):
            raise InvalidRelease(f"{path}: sha256 is not 64 hex digits")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise InvalidRelease(f"{path}: bytes and rows are counts")
        if is_table(path) != (file.rows is not None):
            raise InvalidRelease(f"{path}: a table's file has a count of rows, others have null")
        entries[path] = file
    return Manifest(str(version), protocol, entries)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, sorted by path."""
    content = asdict(manifest) | {
        "files": {p: asdict(manifest.files[p]) for p in sorted(manifest.files)}
    }
    with whole(folder / NAME) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_file(folder: Path, manifest: Manifest, path: str) -> None:
    """Compare a file with its entry.

    Raises:
        InvalidRelease: It differs, is missing, or has no entry.
    """
    known = manifest.files.get(path)
    if known is None:
        raise InvalidRelease(f"{folder / path}: the manifest does not list it")
    if not (folder / path).is_file():
        raise InvalidRelease(f"{folder / path}: the manifest lists it, it is not there")
    found = describe(folder / path)
    if (found.sha256, found.bytes) != (known.sha256, known.bytes):
        raise InvalidRelease(
            f"{folder / path}: not the file that the manifest lists: sha256 {found.sha256[:12]}… "
            f"of {found.bytes} bytes, expected {known.sha256[:12]}… of {known.bytes}"
        )
