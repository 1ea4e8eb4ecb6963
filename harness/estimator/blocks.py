"""The blocks of a model: which parameters form one diagonal block of the Hessian."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from harness.errors import UserError
from harness.estimator.heads import size_of_head, slices_of
from harness.estimator.kinds import (
    OTHER_KINDS,
    WEIGHT_KINDS,
    Kind,
    is_matrix,
    is_transposed,
    kind_of,
)
from spectra_db.words import PARTITIONS

FULL_BLOCK = "__full__"

_HEAD = re.compile(r"(^|_)(head|classifier|score|decoder|fc)($|_)", re.I)
# What `torch.nn.utils.parametrize` computes a parameter from: of weight_norm `original1`, the
# direction, has the weight's shape, and `original0`, the lengths, has not.
_PARAMETRIZED = re.compile(r"((?:.+\.)?)parametrizations\.(\w+)\.original\d*")


@dataclass(frozen=True)
class Part:
    """One parameter, or the slice `start:stop` of it along `dim`.

    Attributes:
        parameter: Name in `model.named_parameters()`; of tied weights the first name.
        dim: Dimension of the slice; None for the whole parameter.
        start: First index of the slice.
        stop: Index after the last one.
    """

    parameter: str
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part's view of `tensor`, which has the parameter's shape."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Block:
    """The parameters of one diagonal block of the Hessian.

    Attributes:
        name: The parameter's name, with `[q]`, `[k]` or `[v]`, and the number of a head, appended
            for a slice; of several weights their module's.
        kind: One of `WEIGHT_KINDS` and `OTHER_KINDS` (attention: a fused weight left whole, or
            what else lies in attention), layer (several weights), or full.
        parts: What the block consists of, in the order in which its vectors are laid out.
        num_params: Number of parameters n; vectors of the block have shape (n,).
        shape: Shape of the parameter or slice; (n,) where the block has several parts.
        is_guessed: The kind is a guess: neither the module, nor its place or name says so.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    num_params: int
    shape: tuple[int, ...]
    is_guessed: bool = False


def find_blocks(
    model: nn.Module,
    partition: str = "weights",
    *,
    paper_blocks: Sequence[str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> list[Block]:
    """List the blocks of a model's Hessian.

    Frozen parameters (`requires_grad=False`) and empty ones belong to no block. Tied weights are
    one block under their first name. A fused weight of query, key and value is split into parts
    that lie one after the other; those known to interleave them head by head are left whole.
    Matrices that no module of torch owns are blocks of `weights` too.

    Args:
        model: Any module; its parameters may be on the meta device.
        partition: `weights` (weight tensors of linear, convolution, embedding and recurrent
            modules, positional embeddings and bare matrices; query, key and value apart), `paper`
            (these and the biases of the same modules, restricted to `paper_blocks`), `all` (every
            parameter), `full` (one block of all parameters), `layers` (the weights of a layer
            together), `heads` (`weights` with query and key cut head by head, as Adam-mini has
            them: Zhang et al. 2024, arXiv 2406.16793). docs/protocol.md defines them.
        paper_blocks: Shell patterns over block names that `paper` keeps; None keeps all.
        kinds: Kinds by shell pattern over names of parameters, which are then left whole, or of
            slices. The first pattern that fits decides, and whether it is a block of `weights`.

    Returns:
        The blocks in the order of `model.named_parameters()`.

    Raises:
        UserError: The partition or a kind is unknown, a pattern matches nothing, or no block is
            left.

    Example:
        >>> from torch import nn
        >>> [block.name for block in find_blocks(nn.Sequential(nn.Linear(3, 2)), "all")]
        ['0.weight', '0.bias']
    """
    if partition not in PARTITIONS:
        raise UserError(f"unknown partition {partition!r}; choose one of {', '.join(PARTITIONS)}")
    if lazy := [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(
            f"the lazy parameter {lazy[0]} has no shape yet; pass one batch through the model "
            "first, model(inputs)"
        )
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    if partition == "full":
        num_params = sum(p.numel() for _, p in named)
        parts = tuple(Part(name) for name, _ in named)
        blocks = [Block(FULL_BLOCK, "full", parts, num_params, (num_params,))] if named else []
    else:
        blocks = list(_parameter_blocks(model, named, kinds or {}))
        weights = [b for b in blocks if b.kind in WEIGHT_KINDS]
        if partition in ("weights", "layers", "heads"):
            blocks = weights
        elif partition == "paper":
            names = {name for b in weights for name in (b.name, b.parts[0].parameter)}
            blocks = [b for b in blocks if b.kind in WEIGHT_KINDS or names & _weights_of_bias(b)]
            if paper_blocks is not None:
                blocks = _matching(blocks, paper_blocks)
    if partition == "layers":
        blocks = _by_layer(blocks)
    elif partition == "heads":
        blocks = [head for block in blocks for head in _by_head(block, model)]
    if not blocks:
        raise UserError(
            f"the model {type(model).__name__} has no trainable parameter in partition "
            f"{partition!r}; unfreeze some, or choose another partition ({', '.join(PARTITIONS)})"
        )
    return blocks


def unclassified(model: nn.Module, kinds: Mapping[str, str] | None = None) -> list[Block]:
    """List what could be weights, but belongs to no block of partition `weights`.

    These are matrices called biases, without a weight that they belong to, and what an entry
    itself says is none. Class tokens and scales are vectors, and not among them; nor are torch's
    norms, biases of stacked experts and Mamba's `A_log`.
    """
    blocks = find_blocks(model, "all", kinds=kinds)
    names = {block.name for block in blocks}
    return [
        b
        for b in blocks
        if is_matrix(b.shape)
        and (b.kind == "other" or (b.kind == "bias" and not names & _weights_of_bias(b)))
    ]


def _parameter_blocks(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], kinds: Mapping[str, str]
) -> Iterator[Block]:
    """Yield the blocks of every parameter, the slices of a fused weight apart."""
    # What torch.compile wraps has the names that it had.
    modules = {_uncompiled(name): module for name, module in model.named_modules()}
    head = _head_name(model)
    allowed = (*WEIGHT_KINDS, *OTHER_KINDS)
    for pattern, word in kinds.items():
        if word not in allowed:
            raise UserError(
                f"the kind of {pattern!r} is {word!r}; choose one of {', '.join(allowed)}"
            )
    used: set[str] = set()

    def given(name: str) -> Kind | None:
        """Return the kind of the first pattern that fits a name, None if none does."""
        fits = [pattern for pattern in kinds if _fits(name, pattern)]
        used.update(fits)
        return Kind(kinds[fits[0]]) if fits else None

    for full_name, parameter in named:
        name = _uncompiled(full_name)
        plain = _plain_name(name, parameter, modules)
        shape = tuple(parameter.shape)
        dim, slices = slices_of(plain, modules, parameter)
        if (kind := given(name)) is not None or not slices:
            kind = kind or kind_of(plain, shape, modules, head)
            whole = (Part(full_name),)
            yield Block(name, kind.name, whole, parameter.numel(), shape, kind.is_guessed)
            continue
        start = 0
        for slice_kind, size in slices:
            part = Part(full_name, dim, start, start := start + size)
            part_shape = (*shape[:dim], size, *shape[dim + 1 :])
            part_name = f"{name}[{slice_kind[0]}]"
            kind = given(part_name) or Kind(slice_kind)
            yield Block(part_name, kind.name, (part,), prod(part_shape), part_shape)
    if unused := [pattern for pattern in kinds if pattern not in used]:
        names = ", ".join(name for name, _ in named)
        raise UserError(f"no block matches {unused[0]!r}; the trainable parameters are {names}")


def _by_layer(blocks: Sequence[Block]) -> list[Block]:
    """Put together the weights of each layer: the innermost numbered module with several.

    What no such module holds stays with the weights of its own module.
    """
    names = {block: _PARAMETRIZED.sub(r"\1\2", block.name) for block in blocks}
    within = Counter(path for name in names.values() for path in _numbered(name))
    layers: dict[str, list[Block]] = {}
    for block, name in names.items():
        own = name.rpartition(".")[0] or name
        layer = next((path for path in _numbered(name) if within[path] > 1), own)
        layers.setdefault(layer, []).append(block)
    return [_joined(layer, members) for layer, members in layers.items()]


def _numbered(name: str) -> list[str]:
    """Return the paths of the numbered modules around a parameter, the innermost first.

    >>> _numbered("layers.0.blocks.1.mlp.weight")
    ['layers.0.blocks.1', 'layers.0']
    """
    words = name.split(".")[:-1]
    return [".".join(words[: i + 1]) for i in range(len(words) - 1, -1, -1) if words[i].isdigit()]


def _joined(layer: str, members: Sequence[Block]) -> Block:
    """Return one block of several, under the layer's name."""
    if len(members) == 1:
        return replace(members[0], name=layer)
    size = sum(block.num_params for block in members)
    parts = tuple(part for block in members for part in block.parts)
    guessed = any(block.is_guessed for block in members)
    return Block(layer, "layer", parts, size, (size,), guessed)


def _by_head(block: Block, model: nn.Module) -> list[Block]:
    """Cut a query or key into its heads; other blocks, and those of unknown heads, stay whole."""
    (part,) = block.parts
    modules = {_uncompiled(name): module for name, module in model.named_modules()}
    name = _plain_name(_uncompiled(part.parameter), model.get_parameter(part.parameter), modules)
    dim = int(is_transposed(modules[name.rpartition(".")[0]])) if part.dim is None else part.dim
    size = 0
    if block.kind in ("query", "key"):
        size = size_of_head(name, modules, block.shape[dim])
    if not size:
        return [block]
    shape = (*block.shape[:dim], size, *block.shape[dim + 1 :])
    return [
        replace(
            block,
            name=f"{block.name}[{head}]",
            parts=(Part(part.parameter, dim, start, start + size),),
            num_params=prod(shape),
            shape=shape,
        )
        for head, start in enumerate(range(part.start, part.start + block.shape[dim], size))
    ]


def _uncompiled(name: str) -> str:
    """Return a name without the words that torch.compile puts into it."""
    return ".".join(word for word in name.split(".") if word != "_orig_mod")


def _plain_name(name: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]) -> str:
    """Return the name that a parametrized weight would have without its parametrization."""
    found = _PARAMETRIZED.fullmatch(name)
    if found is None:
        return name
    path, attribute = found.groups()
    computed = getattr(modules[path.removesuffix(".")], attribute)
    return f"{path}{attribute}" if computed.shape == parameter.shape else name


def _head_name(model: nn.Module) -> str | None:
    """Return the name of the output layer's weight, None if it is tied to an embedding.

    The output layer is the last linear or convolution module outside the repeated layers; where
    the last one is inside them, the one that carries a head's name.
    """
    names = {id(p): _uncompiled(name) for name, p in model.named_parameters()}
    candidates = [
        (path, f"{path}.weight" if is_parametrized(module) else names.get(id(module.weight)))
        for path, module in ((_uncompiled(n), m) for n, m in model.named_modules())
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    for i, (path, name) in enumerate(reversed(candidates)):
        *outer, last = path.split(".")
        repeated = any(word.isdigit() for word in outer)
        if not repeated and (i == 0 or _HEAD.search(last)):
            return name if name == f"{path}.weight" else None
    return None


def _weights_of_bias(block: Block) -> set[str]:
    """Return the names that the weight of a bias may have, none if it is no bias."""
    if block.kind != "bias":
        return set()
    return {re.sub(r"bias(?=$|_)", "weight", block.name), block.name.removesuffix("_bias")}


def _fits(name: str, pattern: str) -> bool:
    """Tell whether a shell pattern fits a name whose brackets are no set of characters."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def _matching(blocks: Sequence[Block], patterns: Sequence[str]) -> list[Block]:
    """Keep the blocks that match one of the shell patterns; each pattern must match."""
    names = [b.name for b in blocks]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise UserError(f"no block matches {pattern!r}; the blocks are {', '.join(names)}")
    return [b for b in blocks if any(_fits(b.name, p) for p in patterns)]
