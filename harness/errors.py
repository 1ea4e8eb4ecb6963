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


# The modules of the extra `harness` of pyproject.toml, which the base install lacks.
EXTRA = frozenset(
    {
        "datasets",
        "safetensors",
        "sklearn",
        "timm",
        "tokenizers",
        "torch",
        "torchvision",
        "transformers",
    }
)


def extra_missing(error: BaseException | None, what: str) -> str | None:
    """Say what to install where an error comes of a module that the base install lacks."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in EXTRA:
            return (
                f"{what} needs {name}, which is not installed: "
                "pip install 'hessian-spectra[harness]'"
            )
        error = error.__cause__ or error.__context__
    return None


def output_error(out: Path | str, error: BaseException) -> OutputError | None:
    """Return what to raise if an error comes of a full, read-only or broken disk.

    Or of one without locks, as that of a cluster may be.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        return OutputError(
            f"{out} is on a file system without locks ({os.strerror(error.errno)}), by which "
            "processes share a folder: mount it with them (NFS 4, Lustre with -o flock), or name "
            "a folder of another disk"
        )
    broken = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
    if not isinstance(error, OSError) or error.errno not in broken:
        return None
    return OutputError(
        f"{out} can't be written to: {os.strerror(error.errno)}; what was finished is kept: mend "
        "that, and the same command continues"
    )


# How allocators and libraries say that there is no memory left, in small letters: CUDA and NCCL,
# the CPU's allocator, then cuBLAS, cuDNN, cuSOLVER, cuSPARSE and cuFFT. These make their handles
# and workspaces late, on a device that is full, and oneDNN compiles a kernel for each shape:
# neither says what it lacks.
_NO_MEMORY = (
    "out of memory",
    "cudaerrormemoryallocation",
    "not enough memory",
    "allocate memory",
    "alloc_failed",
    "allocation_failed",
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    "cusolver_status_not_initialized",
    "insufficient_resources",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine",
    "could not create a primitive",
)


def says_no_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on whatever device."""
    return isinstance(error, MemoryError) or any(s in str(error).lower() for s in _NO_MEMORY)


def one_line(error: BaseException) -> str:
    """Return an error in one line: its class and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def reason_of(error: BaseException) -> str:
    """Return an error in one line, with the remedy where memory ran out."""
    text = one_line(error)
    if says_no_memory(error):
        return f"out of memory, use fewer --jobs or a smaller batch ({text})"
    return text
