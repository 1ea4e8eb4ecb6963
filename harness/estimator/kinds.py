"""The kind of a parameter: by the module that owns it, by its place, its name and its shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

# Of partition `weights`, and those that other partitions add.
WEIGHT_KINDS = (
    *("embedding", "position", "query", "key", "value", "attention", "attention_output"),
    *("mlp", "conv", "head", "recurrent"),
)
OTHER_KINDS = ("state", "norm", "bias", "other")

# What one word of a projection's name says. Beside it stand words that say nothing: `W_Q`,
# `proj_q`, `linear_q`, `qproj`, `q_a_proj` and `to_q` are all the query's.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ROLE = re.compile(
    r"(?:w|fc|lin|linear|proj|conv)?(?:(?P<qkv>qkv)|(?P<kv>kv)|(?P<attention>qk|qv|receptance)"
    r"|(?P<query>q|qs|query|queries)|(?P<key>k|ks|keys?)|(?P<value>v|vs|values?)"
    r"|(?P<output>o|out|output))(?:proj|lin|linear|conv|w)?",
    re.I,
)
_FUSED = re.compile(r"c_attn|att_proj", re.I)
_QKV = ("query", "key", "value")
# Words that say that a layer is one, and no more.
_PLAIN = {"w", "c", "proj", "projection", "dense", "fc", "lin", "linear", "conv", "post", "final"}
# Ends of a path that stand for what is before them: containers, wrappers, low-rank adapters.
_WRAPPER = re.compile(
    r"\d+|default|base_layer|weight|parametrizations|original\d*|adapter|[AB]"
    r"|lora(_?([ab]|up|down|left|right|embedding_[ab]|magnitude\w*))?",
    re.I,
)
# By the name of a module, and by that of its class.
_PLACES = {
    "mlp": (
        re.compile(
            r"(^|_)(mlp|ffn?|ffwd|feed_?forward|intermediate|fc\d+|linear\d+|c_fc|channel_mix(er)?"
            r"|cmix|moe|experts?|router)($|_)|^Dense\w*Dense$",
            re.I,
        ),
        re.compile(r"MLP|FeedForward|FFN|Channel_?Mix|Cmix|Experts?$|MoE|Router$", re.I),
    ),
    "attention": (
        re.compile(
            r"(^|_|self|cross)(attn|attentions?|attends?|mha|mhsa|xattn|sa|att|time_mix(er)?|tmix)"
            r"\d*($|_)|Attention$",
            re.I,
        ),
        re.compile(r"Attention|Attn|MHA|MHSA|^GATv?\d?|Time_?Mix|Tmix", re.I),
    ),
    "recurrent": (
        re.compile(r"(^|_)(rnn|lstm|gru|lru)\d*($|_)|mamba|^mixer$", re.I),
        re.compile(r"RNN|LSTM|GRU|Mamba"),
    ),
}
_POSITION = re.compile(
    r"(^|[._])(pos|positions?|positional|wpe|pe|rel_pos|relative_position"
    r"|relative_attention)([._]|$)|(^|\.)rel\.",
    re.I,
)
_EMBEDDING = re.compile(r"embed|emb$|tokens?$|^(wte|vocab|codebook|latents?|prompts?)$", re.I)
_PATCH = re.compile(r"(^|[._])(patch_embed\w*|conv_proj|patchify|to_patch\w*)|^stem\.proj", re.I)
_STATE = re.compile(r"(^|\.)(A_log|D|dt_bias)$")

# A layer's weight, and what torch's older weight_norm and spectral_norm compute it from.
_OF_LAYERS = ("weight", "weight_v", "weight_orig")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)


class Kind(NamedTuple):
    """What a parameter is for.

    Attributes:
        name: One of `WEIGHT_KINDS` and `OTHER_KINDS`.
        is_guessed: Neither the module that owns it nor its place or name says so.
    """

    name: str
    is_guessed: bool = False


def kind_of(
    name: str, shape: Sequence[int], modules: Mapping[str, nn.Module], head: str | None
) -> Kind:
    """Classify one parameter.

    Args:
        name: Its name, without what torch.compile and parametrizations put into it.
        shape: Its shape.
        modules: The modules of its model by path.
        head: Name of the output layer's weight, None if there is none of its own.
    """
    path, _, attribute = name.rpartition(".")
    module = modules[path]
    if (plain := _of_class(attribute, module, shape)) is not None:
        return Kind(plain)
    is_layer = has_weight(module) and attribute in _OF_LAYERS
    if is_layer and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Kind("position" if _POSITION.search(_spaced(path)) else "embedding")
    if is_layer and name == head:
        return Kind("head")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Kind("attention_output")  # of nn.MultiheadAttention alone
    if not is_layer and (plain := _of_bare(name, shape)) is not None:
        return Kind(plain)
    if not is_projection(module) and isinstance(module, nn.modules.conv._ConvNd):
        return Kind("embedding" if _PATCH.search(path) else "conv")
    return _of_projection(path if is_layer else name, modules, is_layer=is_layer)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, of one that FSDP2 made of it (`FSDPLinear`) its own."""
    first, *others = type(module).__mro__
    return (others[1] if others[0].__name__ == "FSDPModule" else first).__name__


def is_matrix(shape: Sequence[int]) -> bool:
    """Tell whether a shape has two dimensions or more, those of one entry not counted."""
    return sum(side > 1 for side in shape) > 1


def has_weight(module: nn.Module) -> bool:
    """Tell whether a module's `weight` is a block of partition `weights`, whatever its shape."""
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, known) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether it is GPT-2's linear layer, whose weight is (inputs, outputs)."""
    return class_name(module) == "Conv1D"


def is_projection(module: nn.Module) -> bool:
    """Tell whether it maps one place of its input at a time: linear, or a 1 × 1 convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear) or is_transposed(module)


def role_of(path: str) -> str | None:
    """Return what a projection's name says that it is, None if nothing.

    >>> role_of("attn.W_Q"), role_of("q_a_proj"), role_of("attention.output.dense")
    ('query', 'query', 'output')

    Returns:
        query, key, value, output, qkv or kv (fused), or attention (another part of it).
    """
    words = _meaningful(path).split(".")
    found = _roles(words[-1])
    if not found and len(words) > 1 and _is_plain(words[-1]):
        found = _roles(words[-2])
    if len(found) > 1:
        found = found - {"output"}
    if found >= set(_QKV):
        return "qkv"
    if found == {"key", "value"}:
        return "kv"
    return None if not found else found.pop() if len(found) == 1 else "attention"


def place_of(path: str, modules: Mapping[str, nn.Module]) -> tuple[str | None, str]:
    """Return where a parameter or module lies, by the innermost module around it that says so.

    Names count before classes. A query or a key beside each other lie in attention; a key that
    widens beside a value that narrows again, without a query, in a feed-forward network.

    Returns:
        mlp, attention, recurrent or None; and the path of the module that says so.
    """
    outer, _, word = _meaningful(path).rpartition(".")
    if (place := _by_word(word)) is not None:
        return place, outer
    if (place := _by_neighbours(role_of(path), modules[outer])) is not None:
        return place, outer
    while outer:
        where, (outer, _, word) = outer, outer.rpartition(".")
        if (place := _by_word(word) or _by_class(modules[where])) is not None:
            return place, where
    return None, ""


def _of_class(attribute: str, module: nn.Module, shape: Sequence[int]) -> str | None:
    """Return the kind that the owner's class decides, or that of a bias; None for others."""
    named_norm = "norm" in class_name(module).lower() and not is_matrix(shape)
    if isinstance(module, _NORMS) or (named_norm and not has_weight(module)):
        return "norm"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent" if attribute.startswith("weight") else "bias"
    if attribute == "bias" or (attribute.endswith("_bias") and attribute != "dt_bias"):
        return "bias"
    if isinstance(module, nn.MultiheadAttention):
        return next((k for k in _QKV if attribute == f"{k[0]}_proj_weight"), "other")
    return None


def _of_bare(name: str, shape: Sequence[int]) -> str | None:
    """Return the kind of a parameter that no known module owns, None for projections."""
    if _STATE.search(name) and (name.endswith("A_log") or not is_matrix(shape)):
        return "state"
    word = _meaningful(name).rpartition(".")[2]
    if _POSITION.search(_spaced(word)):
        return "position"
    if not is_matrix(shape):
        return "other"
    return "embedding" if _EMBEDDING.search(word) else None


def _of_projection(path: str, modules: Mapping[str, nn.Module], *, is_layer: bool) -> Kind:
    """Classify a linear map by its place and name; `is_layer` if a known module owns it."""
    place, where = place_of(path, modules)
    module = modules.get(path)
    is_conv = isinstance(module, nn.modules.conv._ConvNd)
    if place == "attention" and (kind := _in_attention(path, modules[where])) is not None:
        return Kind(kind)
    if is_conv or _PATCH.search(path):
        return Kind("embedding" if _PATCH.search(path) else "conv")
    if place == "attention":
        return Kind("attention", is_guessed=True)
    if place is not None:
        return Kind(place)
    if path.rpartition(".")[2] in {"x_proj", "dt_proj"}:
        return Kind("recurrent")
    # A linear layer outside of attention is one of a perceptron; of other tensors nothing is known.
    return Kind("mlp", is_guessed=not is_layer or role_of(path) in _QKV)


def _in_attention(path: str, around: nn.Module) -> str | None:
    """Return the kind of a projection inside a module of attention, None if nothing tells."""
    role = role_of(path)
    if role is None and _is_output(path, around):
        role = "output"
    if role == "output":
        return "attention_output"
    if path.endswith("in_proj") or _FUSED.search(path.rpartition(".")[2]):
        return "attention"
    return role if role in _QKV else None if role is None else "attention"


def _is_output(path: str, around: nn.Module) -> bool:
    """Tell whether it is the nameless projection beside those of query, key and value."""
    if not _is_plain(_meaningful(path).rpartition(".")[2]):
        return False
    names = [*(n for n, _ in around.named_modules()), *(n for n, _ in around.named_parameters())]
    return any(_FUSED.search(n) or role_of(n) in (*_QKV, "qkv", "kv") for n in names if n)


def _by_word(word: str) -> str | None:
    return next((place for place, (named, _) in _PLACES.items() if named.search(word)), None)


def _by_class(module: nn.Module) -> str | None:
    """Return the place that a module's class names, unless it is but a block around one."""
    for place, (_, of_class) in _PLACES.items():
        if of_class.search(class_name(module)):
            inner = [m for m in module.modules() if m is not module]
            inside = any(of_class.search(class_name(m)) for m in inner)
            return None if inside and place == "attention" else place
    return None


def _by_neighbours(role: str | None, owner: nn.Module) -> str | None:
    """Return the place that the projections beside one tell, if it has a role like theirs."""
    if role is None:
        return None
    shapes = dict(_projections(owner))
    if {"query", "key"} <= set(shapes) or {"qkv", "kv"} & set(shapes):
        return "attention"
    if "query" not in shapes and {"key", "value"} <= set(shapes):
        (widens, of), (narrows, onto) = shapes["key"], shapes["value"]
        return "mlp" if (widens, of) == (onto, narrows) and widens != of else None
    return None


def _projections(owner: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the roles of a module's own projections, each with the first two sides of its shape."""
    for name, parameter in owner.named_parameters():
        if name.count(".") <= 1 and parameter.dim() > 1 and (role := role_of(name)) is not None:
            yield role, (parameter.shape[0], parameter.shape[1])


def _roles(word: str) -> set[str]:
    if _FUSED.fullmatch(word):
        return {"qkv"}
    found = [_ROLE.fullmatch(part) for part in _WORD.findall(word)]
    return {match.lastgroup for match in found if match is not None and match.lastgroup}


def _is_plain(word: str) -> bool:
    return {part.lower() for part in _WORD.findall(word)} <= _PLAIN


def _meaningful(path: str) -> str:
    """Leave out the end of a path that stands for what is before it, as in `q_proj.lora_A`."""
    outer, _, word = path.rpartition(".")
    return _meaningful(outer) if outer and _WRAPPER.fullmatch(word) else path


def _spaced(name: str) -> str:
    """Set `pos_embed`, `position_embeddings`, `pos_embedding` apart into words."""
    return re.sub(r"[_.]?(embed[a-z]*|emb|encoding\w*|bias_table|bias)", r".", name)
