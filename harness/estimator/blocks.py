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
from spectra_db.words import PARTITIONS

FULL_BLOCK = "__full__"

# The last words of a module's path that name one projection, as timm, transformers, torch and
# nanoGPT-like codes spell them.
_PROJECTIONS = {
    "query": re.compile(r"^(q|query|queries|q_proj|q_lin|to_q|wq|query_proj|q_attn)$", re.I),
    "key": re.compile(r"^(k|key|keys|k_proj|k_lin|to_k|wk|key_proj)$", re.I),
    "value": re.compile(r"^(v|value|values|v_proj|v_lin|to_v|wv|value_proj)$", re.I),
}
# Fused projections whose parts lie one after the other along the output dimension.
_FUSED = {
    re.compile(r"^(qkv|to_qkv|wqkv|c_attn|qkv_proj|in_proj)$", re.I): ("query", "key", "value"),
    re.compile(r"^(kv|to_kv|wkv|kv_proj)$", re.I): ("key", "value"),
}
# All fused projections, those that are left whole included: with parts of unequal sizes, or, as
# GPT-NeoX's `query_key_value`, interleaved head by head.
_ANY_FUSED = re.compile(
    r"^(\w*qkv\w*|query_key_value|(to_|w)?(kv|qk)(_\w+)?|c_attn|att_proj)$", re.I
)
# Modules whose fused weights interleave the parts head by head under a name of `_FUSED`, as do
# those of timm that are made with `head_first=True`.
_INTERLEAVED = {
    "timm.layers.halo_attn.HaloAttn",
    "timm.models.efficientformer.Attention",
    "timm.models.tiny_vit.Attention",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention",
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",
    "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",
}
_ATTENTION = re.compile(r"(^|_)(attn|attention|attend|self_attn|mha|xattn)\d*($|_)", re.I)
_MLP = re.compile(r"(^|_)(mlp|ffn|feed_?forward|intermediate|fc\d*|linear\d+)($|_)", re.I)
_POSITION = re.compile(r"(^|[._])(pos|position|positional|wpe|relative_position)([._]|$)", re.I)
_TOKEN = re.compile(r"(^|[._])(cls|class|dist|reg|mask|register)_token", re.I)
_PATCH = re.compile(r"(^|[._])(patch_embed\w*|conv_proj|patchify|to_patch\w*)|^stem\.proj", re.I)
_STATE = re.compile(r"(^|\.)(A_log|D|dt_bias)$")
_HEAD = re.compile(r"(^|_)(head|classifier|score|decoder|fc)($|_)", re.I)
# What `torch.nn.utils.parametrize` computes a parameter from: of weight_norm `original1`, the
# direction, has the weight's shape, and `original0`, the lengths, has not.
_PARAMETRIZED = re.compile(r"((?:.+\.)?)parametrizations\.(\w+)\.original\d*")

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)


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
        kind: embedding, position, query, key, value, attention (a fused weight left whole),
            attention_output, mlp, conv, head, recurrent, state, norm, bias, other, or full.
        parts: What the block consists of, in the order in which its vectors are laid out.
        num_params: Number of parameters n; vectors of the block have shape (n,).
        shape: Shape of the parameter or slice; (n,) where the block has several parts.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    num_params: int
    shape: tuple[int, ...]


def find_blocks(
    model: nn.Module, partition: str = "weights", *, paper_blocks: Sequence[str] | None = None
) -> list[Block]:
    """List the blocks of a model's Hessian.

    Frozen parameters (`requires_grad=False`) and empty ones belong to no block. Tied weights are
    one block under their first name. A fused weight of query, key and value is split into parts
    that lie one after the other; those known to interleave them head by head are left whole.

    Args:
        model: Any module; its parameters may be on the meta device.
        partition: `weights` (weight tensors of linear, convolution, embedding and recurrent
            modules and positional embeddings; query, key and value apart), `paper` (these and
            the biases of the same modules, restricted to `paper_blocks`), `all` (every
            parameter), `full` (one block of all parameters). docs/protocol.md defines them.
        paper_blocks: Shell patterns over block names that `paper` keeps; None keeps all.

    Returns:
        The blocks in the order of `model.named_parameters()`.

    Raises:
        UserError: The partition is unknown, a pattern matches nothing, or no block is left.

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
        blocks = list(_parameter_blocks(model, named))
        weights = {b.parts[0].parameter for b in blocks if _is_weight(b)}
        if partition == "weights":
            blocks = [b for b in blocks if _is_weight(b)]
        elif partition == "paper":
            blocks = [b for b in blocks if _is_weight(b) or _weight_of_bias(b) in weights]
            if paper_blocks is not None:
                blocks = _matching(blocks, paper_blocks)
    if not blocks:
        raise UserError(
            f"the model {type(model).__name__} has no trainable parameter in partition "
            f"{partition!r}; unfreeze some, or choose another partition ({', '.join(PARTITIONS)})"
        )
    return blocks


def unclassified(model: nn.Module) -> list[Block]:
    """List what could be weights, but belongs to no block of partition `weights`.

    No module that is known owns these parameters. Class tokens and scales are vectors, and not
    among them; nor are torch's norms and Mamba's `A_log`.
    """
    blocks = find_blocks(model, "all")
    return [b for b in blocks if b.kind in {"other", "bias"} and _is_matrix(b.shape)]


def _parameter_blocks(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[Block]:
    """Yield the blocks of every parameter, the slices of a fused weight apart."""
    # What torch.compile wraps has the names that it had.
    modules = {_uncompiled(name): module for name, module in model.named_modules()}
    head = _head_name(model)
    for full_name, parameter in named:
        name = _uncompiled(full_name)
        plain = _plain_name(name, parameter, modules)
        path, _, attribute = plain.rpartition(".")
        shape = tuple(parameter.shape)
        kind = _kind(plain, attribute, modules[path], head, shape)
        parent = modules[path.rpartition(".")[0]]
        fused = _fused_kinds(path, attribute, modules[path], parent, parameter)
        if fused:
            dim = 1 if type(modules[path]).__name__ == "Conv1D" else 0
            size = shape[dim] // len(fused)
            for i, part_kind in enumerate(fused):
                part = Part(full_name, dim, i * size, (i + 1) * size)
                part_shape = (*shape[:dim], size, *shape[dim + 1 :])
                yield Block(
                    f"{name}[{part_kind[0]}]", part_kind, (part,), prod(part_shape), part_shape
                )
        else:
            yield Block(name, kind, (Part(full_name),), parameter.numel(), shape)


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


def _fused_kinds(
    path: str, attribute: str, module: nn.Module, parent: nn.Module, parameter: nn.Parameter
) -> tuple[str, ...]:
    """Return the kinds of the equal slices of a fused attention weight, () if it is not one."""
    if isinstance(module, nn.MultiheadAttention):
        return ("query", "key", "value") if attribute == "in_proj_weight" else ()
    if attribute != "weight" or parameter.dim() < 2 or _interleaves(parent):
        return ()
    outer, _, last = path.rpartition(".")
    is_conv1d = type(module).__name__ == "Conv1D"
    out_size, in_size = parameter.shape[is_conv1d], parameter.shape[not is_conv1d]
    for pattern, kinds in _FUSED.items():
        # Mamba calls its gated input projection `in_proj` too: 2 x 2 x width, not 3 x width.
        # Grouped queries make the parts unequal; such a weight is left whole.
        if pattern.match(last) and out_size == len(kinds) * in_size:
            in_attention = last != "in_proj" or _ATTENTION.search(outer.rpartition(".")[2])
            return kinds if in_attention else ()
    return ()


def _interleaves(module: nn.Module) -> bool:
    """Tell whether an attention module is known to lay its fused weight out head by head."""
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    return bool(names & _INTERLEAVED) or getattr(module, "head_first", None) is True


def _kind(
    name: str, attribute: str, module: nn.Module, head: str | None, shape: tuple[int, ...]
) -> str:
    """Classify one parameter by the module that owns it, by its path and by its shape."""
    path = name.rpartition(".")[0]
    words = path.split(".")
    named_norm = "norm" in type(module).__name__.lower() and not _is_matrix(shape)
    if isinstance(module, _NORMS) or (named_norm and not _has_weight(module)):
        return "norm"
    if isinstance(module, nn.RNNBase):
        return "recurrent" if attribute.startswith("weight") else "bias"
    if attribute == "bias" or (attribute.endswith("_bias") and attribute != "dt_bias"):
        return "bias"
    if isinstance(module, nn.MultiheadAttention):
        return next((k for k in _PROJECTIONS if attribute == f"{k[0]}_proj_weight"), "other")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "position" if _POSITION.search(_spaced(path)) else "embedding"
    if not _has_weight(module) or attribute != "weight":
        if _STATE.search(name) and (attribute == "A_log" or not _is_matrix(shape)):
            return "state"
        if _TOKEN.search(name):
            return "other"
        return "position" if _POSITION.search(_spaced(name)) else "other"
    if name == head:
        return "head"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention_output"  # of nn.MultiheadAttention alone
    if _is_fused(words):
        return "attention"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "embedding" if _PATCH.search(path) else "conv"
    for kind, pattern in _PROJECTIONS.items():
        if pattern.match(words[-1]):
            return kind
    if words[-1] in {"x_proj", "dt_proj"} or any("mamba" in w or w == "mixer" for w in words):
        return "recurrent"
    if _PATCH.search(path):
        return "embedding"
    for word in reversed(words):  # the innermost name decides
        if _ATTENTION.search(word):
            return "attention_output"
        if _MLP.search(word):
            return "mlp"
    return "mlp"


def _is_fused(words: Sequence[str]) -> bool:
    """Tell whether a path is that of a fused projection, or of its layer as in `qkv.conv`."""
    if words[-1] == "in_proj":  # also Mamba's, and that of gated convolutions
        return any(_ATTENTION.search(word) for word in words)
    inner = words[-1] in {"conv", "linear"} and len(words) > 1
    return bool(_ANY_FUSED.match(words[-2] if inner else words[-1]))


def _is_matrix(shape: Sequence[int]) -> bool:
    """Tell whether a shape has two dimensions or more, those of one entry not counted."""
    return sum(side > 1 for side in shape) > 1


def _spaced(name: str) -> str:
    """Set `pos_embed`, `position_embeddings`, `pos_embedding` apart into words."""
    return re.sub(r"[_.]?(embed\w*|emb|encoding\w*|bias_table)", r".", name)


def _has_weight(module: nn.Module) -> bool:
    """Tell whether the module's `weight` is a block of partition `weights`."""
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, known) or type(module).__name__ == "Conv1D"


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
    return block.kind not in {"norm", "bias", "state", "other"}


def _weight_of_bias(block: Block) -> str:
    """Return the name of the weight that a bias belongs to, "" if it is no bias."""
    return re.sub(r"bias(?=$|_)", "weight", block.name) if block.kind == "bias" else ""


def _matching(blocks: Sequence[Block], patterns: Sequence[str]) -> list[Block]:
    """Keep the blocks that match one of the shell patterns; each pattern must match."""

    def matches(name: str, pattern: str) -> bool:
        # A slice's name holds brackets, which a shell pattern reads as a set of characters.
        return fnmatchcase(name, pattern.replace("[", "[[]"))

    names = [b.name for b in blocks]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise UserError(f"no block matches {pattern!r}; the blocks are {', '.join(names)}")
    return [b for b in blocks if any(matches(b.name, p) for p in patterns)]
