"""CUDA on a machine without one: what a program gets wrong first is found by emulating its rules.

Tensors that are put on `cuda` are wrappers around tensors of the CPU. They say `cuda:0`, do not mix
with tensors of the CPU, have no `.numpy()`, and draw from generators of CUDA alone. Kernels that
have no deterministic version on CUDA are counted. Values are real, so that a run gives the numbers
that it gives on the CPU. What it can't show: kernels, cuDNN, NCCL, memory, speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "Emulated GPU"
# What the wrappers are to torch itself: a device that needs no driver.
_STAND_IN = torch.device("lazy", 0)
# Take tensors of two devices: copies, and indexes, which may be on the CPU.
_MIX = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
# docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html: what raises there.
_NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "max_unpool2d",
    "median",
    "nll_loss2d_forward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
}


@dataclass
class Seen:
    """What was asked of the emulated device.

    Attributes:
        calls: Operations by name.
        nondeterministic: Those that have no deterministic kernel.
        waits: Where the program waited for a number, or for a copy to the device: by operation.
    """

    calls: Counter[str] = field(default_factory=Counter)
    nondeterministic: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCuda:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=_STAND_IN,
        )  # fmt: skip
        wrapper.inner = inner.detach()
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, None)

    def __repr__(self) -> str:
        return f"OnCuda({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made: torch.Tensor = OnCuda(self.inner.clone())
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made)
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class _Mode(TorchDispatchMode):
    """Sees what makes tensors on CUDA, beside what is done with them."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self._seen)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "lazy")


def _run(func, args, kwargs, seen: Seen | None):
    """Check an operation by CUDA's rules, do it on the CPU, and wrap what comes of it."""
    leaves, structure = tree_flatten((args, kwargs))
    there = [x for x in leaves if isinstance(x, OnCuda)]
    device = kwargs.get("device")
    if not there and not _is_cuda(device):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    makes_cuda = _is_cuda(device) if device is not None else True
    if name == "copy_":
        makes_cuda = isinstance(args[0], OnCuda)
    _check(name, args, kwargs, [x for x in leaves if isinstance(x, torch.Tensor)], makes_cuda)
    if seen is not None:
        seen.calls[name] += 1
        seen.nondeterministic[name] += name in _NONDETERMINISTIC
        seen.waits[name] += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
    plain_leaves = [x.inner if isinstance(x, OnCuda) else x for x in leaves]
    plain_args, plain = tree_unflatten(plain_leaves, structure)
    if device is not None:
        plain["device"] = CPU
    plain.pop("pin_memory", None)
    result = func(*plain_args, **plain)
    if not makes_cuda:
        return result
    known = {id(x.inner): x for x in there}  # what an operation in place returns

    def wrapped(t: torch.Tensor) -> torch.Tensor:
        return known[id(t)] if id(t) in known else OnCuda(t)

    return (
        wrapped(result)
        if isinstance(result, torch.Tensor)
        else tree_map_only(torch.Tensor, wrapped, result)
    )


def _check(name, args, kwargs, tensors, makes_cuda: bool) -> None:
    """Raise what CUDA would."""
    strays = [x for x in tensors if not isinstance(x, OnCuda) and x.dim() > 0]
    if strays and len(strays) < len(tensors) and name not in _MIX:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! (when checking {name})"
        )
    is_index = name.startswith(("index", "_index")) and not isinstance(args[0], OnCuda)
    if is_index and len(strays) < len(tensors):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    generator = kwargs.get("generator")
    wanted = "cuda" if makes_cuda else "cpu"
    if generator is not None and generator.device.type != wanted:
        raise RuntimeError(
            f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'"
        )


@contextmanager
def emulated_cuda() -> Iterator[Seen]:
    """Let there be one GPU inside; nothing is left of it afterwards."""
    seen = Seen()
    properties = SimpleNamespace(
        total_memory=80 << 30, name=NAME, multi_processor_count=132, major=9, minor=0
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "memory_allocated": 1 << 30,
        "max_memory_allocated": 2 << 30,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "empty_cache": None,
        "set_device": None,
        "manual_seed_all": None,
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    optimizer = torch.optim.Optimizer
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        for name in ("_accelerator", "_cuda"):  # whichever this version of torch has
            check = f"{name}_graph_capture_health_check"
            stack.enter_context(mock.patch.object(optimizer, check, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", partialmethod(_to, seen)))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin_memory))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        replaces = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, replaces)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Mode(seen))
        yield seen


_TO, _APPLY = torch.Tensor.to, nn.Module._apply


def _pin_memory(self: torch.Tensor) -> torch.Tensor:
    """Mark a copy as one from which the device can read by itself."""
    if isinstance(self, OnCuda):
        raise RuntimeError("only dense CPU tensors can be pinned")
    pinned = self.clone()
    pinned.is_pinned_here = True
    return pinned


def _to(self: torch.Tensor, seen: Seen, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Take `cuda` for `cuda:0`, and leave alone what is there already."""

    def indexed(x: Any) -> Any:
        return CUDA if isinstance(x, str | torch.device) and _is_cuda(x) else x

    args = tuple(indexed(x) for x in args)
    kwargs = {name: indexed(x) for name, x in kwargs.items()}
    here = (CUDA, self.dtype, None, False)
    asked = (*args, *kwargs.values())
    others = [x for x in asked if isinstance(x, torch.Tensor) or x not in here]
    if isinstance(self, OnCuda) and not others:
        return self
    goes = not isinstance(self, OnCuda) and CUDA in asked
    flies = getattr(self, "is_pinned_here", False) and kwargs.get("non_blocking")
    seen.waits["to"] += goes and not flies
    return _TO(self, *args, **kwargs)


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Convert a module, whose parameters are replaced here, and keep tied ones tied."""
    places = [(module, name, id(p)) for module in self.modules()
              for name, p in module._parameters.items() if p is not None]  # fmt: skip
    _APPLY(self, fn, recurse)
    first: dict[int, nn.Parameter] = {}
    for module, name, key in places:
        module._parameters[name] = first.setdefault(key, module._parameters[name])
    return self
