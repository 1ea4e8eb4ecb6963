"""What a backward pass that runs asks for."""

from __future__ import annotations

from typing import Any

import torch


def is_used(ctx: Any, index: int) -> bool:
    """Tell whether the running backward pass uses the gradient of an input of a function.

    As torch's own operations ask (`task_should_compute_output` in its autograd/function.h).

    Args:
        ctx: The context of a `torch.autograd.Function`'s `backward`.
        index: The place of the input among the tensors that `forward` was given.
    """
    node = ctx.next_functions[index][0]
    if node is None:  # a constant
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for the leaves that the pass differentiates by
        return True
