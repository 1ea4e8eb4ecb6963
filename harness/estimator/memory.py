"""How much memory a computation takes, and what to do when it runs out."""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.errors import says_no_memory

# The CPU's allocator takes more than tensors hold, through gaps between them: 1.45 times in a GPT.
_GAPS = 1.5


class PeakMemory(TorchDispatchMode):
    """Measures the most bytes of tensors that live at a time, of those made inside.

    On CUDA as its allocator counts. Elsewhere by following the storages that operations return,
    and allowing half as much again for the allocator's gaps.

    Attributes:
        peak: The result.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.peak = 0
        self._cuda = device if device.type == "cuda" else None
        self._now = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._now = torch.cuda.memory_allocated(self._cuda)
        else:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._cuda is not None:
            self.peak = torch.cuda.max_memory_allocated(self._cuda) - self._now
        else:
            super().__exit__(*error)
            self.peak = int(self.peak * _GAPS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage in self._seen or storage in known:  # a view, or changed in place
                continue
            self._seen.add(storage)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, nbytes: int) -> None:
        self._now -= nbytes


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or says_no_memory(error)


def release_cache(device: torch.device) -> None:
    """Give freed memory back that a device's allocator keeps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided
