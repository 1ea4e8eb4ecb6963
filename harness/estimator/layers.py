"""Layers that are linear in their weight, and what goes into them and comes out in a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness.estimator.batches import Batch, leading_size
from harness.estimator.hessian import BlockHessian

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Traces = dict[int, tuple[torch.Tensor, torch.Tensor]]
_ROUNDING = 512  # eps of the dtype


def layers_of(hessian: BlockHessian, indices: Iterable[int]) -> dict[int, Layer]:
    """Return the linear layer or convolution of each block that is the whole weight of one."""
    modules = dict(hessian.model.named_modules())  # scripted ones refuse get_submodule
    found = {}
    for i in indices:
        part, *others = hessian.blocks[i].parts
        module, _, name = part.parameter.rpartition(".")
        layer = modules.get(module)
        if isinstance(layer, Layer) and name == "weight" and part.dim is None and not others:
            found[i] = layer
    return found


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether a sum of millions is autograd's, which sums up in another order, to rounding."""
    allowed = _ROUNDING * torch.finfo(expected.dtype).eps * float(expected.norm())
    return float((found - expected).norm()) <= allowed


def without_bias(layer: Layer, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a layer makes of x with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # its padding and strides


def places(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Return what the weight multiplies at each place of the outputs.

    Args:
        layer: A linear layer, or a convolution in two dimensions without groups that pads with
            zeros.
        x: Its inputs, of a convolution in four dimensions.
        y: What it returned.

    Returns:
        Inputs of all places of all samples, shape (places, columns of the weight), and y's
        dimension of channels. None for other layers.
    """
    if isinstance(layer, nn.Linear):
        return (x.reshape(-1, x.shape[-1]), y.dim() - 1) if y.dim() > 1 else None
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    if not plain or x.dim() != 4 or isinstance(layer.padding, str):
        return None
    assert isinstance(layer, nn.Conv2d)
    sizes: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return F.unfold(x, *sizes).transpose(1, 2).flatten(0, 1), 1


def traced(
    hessian: BlockHessian, batch: Batch, layers: Mapping[int, Layer]
) -> tuple[torch.Tensor, Traces]:
    """Return the outputs of a batch, and what goes into each layer and comes out of it.

    Of those that are called once, on all samples, in the arithmetic of the products, and not inside
    of a transform of torch.func, whose tensors end with it.
    """
    calls: dict[int, list[tuple[torch.Tensor, torch.Tensor] | None]] = {i: [] for i in layers}

    def keep(index: int, _: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        x = next(iter([*args, *kwargs.values()]), None)
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return y  # of someone's own class
        is_inside = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (x, y))
        calls[index].append(None if is_inside else (x.detach(), y))
        return y.clone()  # what comes next may write into it

    with ExitStack() as hooks:
        for i, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, i), with_kwargs=True))
        z = hessian.outputs(batch)
    size, dtype = leading_size(batch), hessian.dtype
    once = {i: found[0] for i, found in calls.items() if len(found) == 1 and found[0]}
    return z, {
        i: (x, y)
        for i, (x, y) in once.items()
        if x.shape[:1] == y.shape[:1] == (size,) and x.dtype == y.dtype == dtype and y.requires_grad
    }
