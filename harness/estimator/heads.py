"""Where weights of attention are cut: a fused one into query, key and value, and these by heads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from harness.estimator.kinds import class_name, has_weight, is_transposed, place_of

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


def slices_of(
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
    query, key, _ = _outputs(parent)
    sizes = [query] * (len(kinds) == len(_QKV)) + [key] * 2
    fits = sum(sizes) == num_outputs
    return dim, list(zip(kinds, sizes, strict=True)) if fits else []


def size_of_head(name: str, modules: Mapping[str, nn.Module], num_outputs: int) -> int:
    """Return the outputs of one head of a query or key, 0 if its module does not tell.

    Args:
        name: The parameter's name, without what parametrizations put into it.
        modules: The modules of its model by path.
        num_outputs: Outputs of the query or the key, those of all of its heads.
    """
    path = name.rpartition(".")[0]
    module = modules[path]
    is_torch = isinstance(module, nn.MultiheadAttention)
    if not (is_torch or has_weight(module)):
        return 0  # nothing says which side of a bare matrix the heads are on
    *outputs, size = _outputs(module if is_torch else modules[place_of(path, modules)[1]])
    return size if num_outputs in outputs else 0


def _outputs(attention: nn.Module) -> tuple[int, int, int]:
    """Return the outputs of the query, of the key and of one head, zeros if unknown."""
    config = getattr(attention, "config", None)

    def number(*names: str) -> int:
        found = [getattr(place, n, None) for place in (attention, config) for n in names]
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), 0)

    size = number(
        *("qk_head_dim", "head_dim", "dim_head", "d_head", "head_size", "attention_head_size"),
        *("d_k", "key_value_proj_dim"),
    )
    heads = number("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
    groups = number("num_key_value_groups", "n_rep")  # queries of a key
    grouped = number(  # keys and values, which several queries may share
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads"),
        *("n_local_heads", "n_query_groups", "num_query_groups"),
    )
    grouped = grouped or (heads // groups if groups else heads)
    width = number("embed_dim", "hidden_size", "n_embd", "d_model", "dim")
    size = size or (width // heads if heads else 0)
    return heads * size, grouped * size, size


def _interleaves(module: nn.Module) -> bool:
    """Tell whether an attention module is known to lay its fused weight out head by head."""
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    # Diffusion models give the fused outputs to a module that cuts them head by head.
    names |= {class_name(child) for child in module.children()}
    return bool(names & _INTERLEAVED) or getattr(module, "head_first", None) is True
