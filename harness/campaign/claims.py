"""One process at a time does a unit of work in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from harness.campaign.unit import Unit
from harness.errors import UserError


@contextmanager
def claim(out: Path, unit: Unit) -> Iterator[bool]:
    """Take a unit for this process; yields False if another one has it.

    A lock on a file, which ends with the process, however that ends. On a cluster the folder's
    file system must pass `flock` on to other machines (NFS 4, Lustre with -o flock).
    The name is that of a lock, which releases leave out.
    """
    path, is_new = out / ".claims" / f".{unit.slug}.lock", not out.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if is_new:
            path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # unless something came of it
                path.parent.rmdir()
                out.rmdir()


@contextmanager
def claim_or_refuse(out: Path, unit: Unit) -> Iterator[None]:
    """Take a unit for this process.

    Raises:
        UserError: Another process has it.
    """
    with claim(out, unit) as ours:
        if not ours:
            raise UserError(
                f"another process does this in {out} now ({unit}): wait for it, or name another "
                "--out"
            )
        yield
