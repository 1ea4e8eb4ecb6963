"""The blocks of a model: which parameters form one diagonal block of the Hessian."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from harness.errors import UserError
from harness.estimator.kinds import (
    OTHER_KINDS,
    WEIGHT_KINDS,
    Kind,
    is_matrix,
    is_transposed,
    kind_of,
    place_of,
)
from spectra_db.words import PARTITIONS

FULL_BLOCK = "__full__"

_QKV = ("query", "key", "value")
# Fused projections whose parts lie one after the other along the output dimension.
_FUSED = {
    re.compile(r"^(qkv|to_qkv|w_?qkv|c_attn|qkv_proj|qkv_linear|in_proj)$", re.I): _QKV,
    re.compile(r"^(kv|to_kv|w_?kv|kv_proj|kv_linear)$", re.I): _QKV[1:],
}
# Modules whose fused weights interleave the parts head by head under a name of `_FUSED`, as do
# those of timm that are made with `head_first=True`.
_INTERLEAVED = {
    "QKVAttentionLegacy",
    "timm.layers.halo_attn.HaloAttn",
    "timm.models.efficientformer.Attention",
    "timm.models.tiny_vit.Attention",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention",
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",
    "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",
}
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
        name: The parameter's name, with `[q]`, `[k]` or `[v]` appended for a slice.
        kind: One of `WEIGHT_KINDS` and `OTHER_KINDS` (attention: a fused weight left whole, or
            what else lies in attention), or full.
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
            parameter), `full` (one block of all parameters). docs/protocol.md defines them.
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
        weights = {b.name for b in blocks if _is_weight(b)}
        weights |= {b.parts[0].parameter for b in blocks if _is_weight(b)}
        if partition == "weights":
            blocks = [b for b in blocks if _is_weight(b)]
        elif partition == "paper":
            blocks = [b for b in blocks if _is_weight(b) or weights & _weights_of_bias(b)]
            if paper_blocks is not None:
                blocks = _matching(blocks, paper_blocks)
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
    given = _Given(kinds)
    for full_name, parameter in named:
        name = _uncompiled(full_name)
        plain = _plain_name(name, parameter, modules)
        shape = tuple(parameter.shape)
        dim, slices = _slices(plain, modules, parameter)
        if (kind := given.kind(name)) is not None or not slices:
            kind = kind or kind_of(plain, shape, modules, head)
            whole = (Part(full_name),)
            yield Block(name, kind.name, whole, parameter.numel(), shape, kind.is_guessed)
            continue
        start = 0
        for slice_kind, size in slices:
            part = Part(full_name, dim, start, start := start + size)
            part_shape = (*shape[:dim], size, *shape[dim + 1 :])
            part_name = f"{name}[{slice_kind[0]}]"
            kind = given.kind(part_name) or Kind(slice_kind)
            yield Block(part_name, kind.name, (part,), prod(part_shape), part_shape)
    given.check_all_matched([name for name, _ in named])


class _Given:
    """The kinds that an entry gives, and which of its patterns fitted."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        allowed = (*WEIGHT_KINDS, *OTHER_KINDS)
        for pattern, kind in kinds.items():
            if kind not in allowed:
                raise UserError(
                    f"the kind of {pattern!r} is {kind!r}; choose one of {', '.join(allowed)}"
                )
        self.kinds, self.used = kinds, set[str]()

    def kind(self, name: str) -> Kind | None:
        """Return the kind of the first pattern that fits a name, None if none does."""
        fits = [pattern for pattern in self.kinds if _fits(name, pattern)]
        self.used |= set(fits)
        return Kind(self.kinds[fits[0]]) if fits else None

    def check_all_matched(self, names: Sequence[str]) -> None:
        """Raise unless each pattern fitted some name."""
        if unused := [pattern for pattern in self.kinds if pattern not in self.used]:
            raise UserError(
                f"no block matches {unused[0]!r}; the trainable parameters are {', '.join(names)}"
            )


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


def _slices(
    name: str, modules: Mapping[str, nn.Module], parameter: nn.Parameter
) -> tuple[int, list[tuple[str, int]]]:
    """Return the dimension of a fused weight's parts, and the kind and size of each.

    There are none where it is no fused weight, or the sizes of its parts are not known.
    """
    path, _, attribute = name.rpartition(".")
    module, parent = modules[path], modules[path.rpartition(".")[0]]
    if isinstance(module, nn.MultiheadAttention):
        size = len(parameter) // 3
        return 0, [(k, size) for k in _QKV] if attribute == "in_proj_weight" else []
    last = path.rpartition(".")[2]
    kinds = next((kinds for pattern, kinds in _FUSED.items() if pattern.match(last)), ())
    if not kinds or attribute != "weight" or parameter.dim() < 2 or _interleaves(parent):
        return 0, []
    # Mamba calls its gated input projection `in_proj` too.
    if last == "in_proj" and place_of(path, modules)[0] != "attention":
        return 0, []
    dim = int(is_transposed(module))
    num_outputs, num_inputs = parameter.shape[dim], parameter.shape[1 - dim]
    if num_outputs == len(kinds) * num_inputs:
        return dim, [(k, num_inputs) for k in kinds]
    sizes = _sizes_of_heads(parent, len(kinds) == len(_QKV))
    fits = sum(sizes) == num_outputs
    return dim, list(zip(kinds, sizes, strict=True)) if fits else []


def _sizes_of_heads(attention: nn.Module, has_query: bool) -> list[int]:
    """Return the outputs of the query, if it is there, the key and the value; zeros if unknown.

    Grouped queries have more heads than keys and values; all have one dimension.
    """
    config = getattr(attention, "config", None)

    def number(*names: str) -> int:
        found = [getattr(place, n, None) for place in (attention, config) for n in names]
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), 0)

    size = number("head_dim", "dim_head", "d_head", "head_size", "d_k")
    heads = number("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
    groups = number("num_key_value_groups", "n_rep")  # queries of a key
    grouped = number(
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads"),
        *("n_local_heads", "n_query_groups", "num_query_groups"),
    )
    grouped = grouped or (heads // groups if groups else heads)
    width = number("embed_dim", "hidden_size", "n_embd", "d_model", "dim")
    size = size or (width // heads if heads else 0)
    return [heads * size] * has_query + [grouped * size] * 2


def _interleaves(module: nn.Module) -> bool:
    """Tell whether an attention module is known to lay its fused weight out head by head."""
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    # Diffusion models give the fused outputs to a module that cuts them head by head.
    names |= {type(child).__name__ for child in module.children()}
    return bool(names & _INTERLEAVED) or getattr(module, "head_first", None) is True


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


def _is_weight(block: Block) -> bool:
    """Tell whether the block belongs to partition `weights`."""
    return block.kind in WEIGHT_KINDS


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
