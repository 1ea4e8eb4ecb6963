"""Errors whose text is for the user."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class UserError(Exception):
    """Say what was given, what is allowed and what to do, in one line.

    The command line prints the text and exits with code 2.
    """


class OutputError(Exception):
    """Say that results can't be written any more: what would follow is lost, so the run ends."""


def output_error(out: Path | str, error: BaseException) -> OutputError | None:
    """Return what to raise if an error comes of a full, read-only or broken disk."""
    broken = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
    if not isinstance(error, OSError) or error.errno not in broken:
        return None
    return OutputError(
        f"{out} can't be written to: {os.strerror(error.errno)}; what was finished is kept: mend "
        "that, and the same command continues"
    )


def reason_of(error: BaseException) -> str:
    """Return an error in one line, with the remedy where memory ran out."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return f"out of memory, use fewer --jobs or a smaller batch ({text})"
    return text
