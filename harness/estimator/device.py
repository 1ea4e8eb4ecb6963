"""The device of a computation: its choice, its name, its memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
from torch import nn

from harness.errors import UserError


def choose_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return the device to compute on; raise if it is not there."""
    if device is None:
        parameter = next(model.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")
    try:
        target = local_device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}); choose cpu, or cuda where there "
            "is a GPU"
        ) from error
    return target


def local_device(device: torch.device | str) -> torch.device:
    """Return the device that a name means to a process: `cuda` is its own GPU under torchrun.

    Else each process would take memory of the first GPU before it goes to its own.
    """
    target, size = torch.device(device), int(os.environ.get("WORLD_SIZE", "1"))
    if target.type == "cuda" and target.index is None and size > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return target


def device_name(device: torch.device) -> str:
    """Return the device's model name: "cpu", or what CUDA calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_memory(device: torch.device) -> int:
    """Return the memory of a device, in bytes; of a container its limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def memory_share(device: torch.device) -> int:
    """Return the memory budget of a process: half of the device's memory, in bytes.

    On CPU the processes that torchrun starts on a machine divide it among them.
    """
    processes = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return device_memory(device) // (2 * processes)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: the device's, or that of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
