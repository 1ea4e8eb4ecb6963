"""Where data come from: the data root first, then the Hub; and the checksum of what was used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import UserError

ENVIRONMENT = "HARNESS_DATA_ROOT"


def resolve_root(data_root: Path | str | None) -> Path | None:
    """Return the data root: the argument, else `HARNESS_DATA_ROOT`, else None.

    Raises:
        UserError: the folder that was named does not exist.
    """
    named = data_root or os.environ.get(ENVIRONMENT)
    if not named:
        return None
    root = Path(named).expanduser().resolve()
    if not root.is_dir():
        raise UserError(
            f"data root {root} is not a folder; give --data-root (or {ENVIRONMENT}) "
            "a folder laid out as docs/commands.md, Data sets, says"
        )
    return root


def find(root: Path | None, *paths: str) -> list[Path] | None:
    """Return these files below the root, or None unless all of them are there."""
    if root is None:
        return None
    files = [root / path for path in paths]
    return files if all(file.is_file() for file in files) else None


def missing(task: str, root: Path | None, paths: Iterable[str], hint: str) -> UserError:
    """Return the error for data that are not there: what was expected where, and the remedy."""
    where = f"below the data root {root}" if root else "(no data root is set)"
    return UserError(
        f"task {task!r} needs {', '.join(paths)} {where}: put it there and pass --data-root "
        f"or set {ENVIRONMENT}; {hint}"
    )


def from_hub(
    task: str,
    root: Path | None,
    paths: Iterable[str],
    repo: str,
    read: Callable[[Callable[..., Any]], Any],
) -> tuple[Any, str]:
    """Read a data set from the Hub at its present revision.

    Args:
        task: name of the task, for the message.
        root: the data root that lacks `paths`, for the message.
        paths: what the data root should hold, for the message.
        repo: the data set's id on the Hub.
        read: called with `datasets.load_dataset` of this data set at that revision; returns what
            the task needs.

    Returns:
        What `read` returned, and a source text that names the id and the resolved revision.

    Raises:
        UserError: the Hub cannot be reached, or does not hand out the data set.
    """
    import datasets
    from huggingface_hub import HfApi

    from spectra_db.hub import reason_of

    try:
        revision = HfApi().dataset_info(repo, timeout=10).sha or "main"
        load = partial(datasets.load_dataset, repo, revision=revision)
        return read(load), f"Hub {repo} at {revision}"
    # What the network stack raises differs between versions of the Hub's client.
    except Exception as error:
        hint = f"the Hub data set {repo} was tried and failed ({reason_of(error)[:160]})"
        raise missing(task, root, paths, hint) from error


def sha256(parts: Iterable[bytes]) -> str:
    """Hash the concatenation of the parts.

    >>> sha256([b"a", b"bc"]) == sha256([b"abc"])
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_source(files: list[Path], note: str = "") -> tuple[str, str]:
    """Return the source text and the checksum of files: sha256 of their contents in order."""
    names = ", ".join(f"{file.parent.name}/{file.name}" for file in files)
    return names + (f" ({note})" if note else ""), sha256(file.read_bytes() for file in files)
