"""The GPT of the benchmarks in JAX, for a comparison of its products. `make bench-peers`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cases import Case
from harness import find_blocks

# Torch computes on one thread too. To be said before jax is imported.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp

Array = Any
Weights = dict[str, Array]


def products(case: Case, vectors: Weights | None = None) -> list[Callable[[], Array]]:
    """Return products with blocks of partition `weights`: each's gradient, linearized, compiled.

    What does not depend on the vector is computed here, once (`jax.linearize`); a product calls
    what is left, compiled by XLA.

    Args:
        case: A GPT, untied and without biases, with its loss and batch.
        vectors: What blocks are multiplied with, by name; every block with ones unless given.
    """
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in case.model.named_parameters()}
    tokens, targets = (jnp.asarray(x.numpy()) for x in case.batch)
    num_heads = case.model.h[0].attn.num_heads

    def loss(changed: Weights, others: Weights) -> Array:
        z = logits(others | changed, tokens, len(case.model.h), num_heads)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)
        return -chosen.mean()

    # Weights are arguments: XLA would fold constants.
    linearize = jax.jit(
        lambda w, others: jax.linearize(partial(jax.grad(loss), others=others), w)[1]
    )
    apply = jax.jit(lambda linear, v: linear(v))
    found = []
    if vectors is None:
        vectors = {b.name: jnp.ones_like(weights[b.name]) for b in find_blocks(case.model)}
    for name, vector in vectors.items():
        linear = linearize({name: weights[name]}, weights)
        v = {name: jnp.asarray(vector)}
        found.append(lambda a=linear, v=v, k=name: apply(a, v)[k].block_until_ready())
    return found


def logits(w: Weights, tokens: Array, num_layers: int, num_heads: int) -> Array:
    """Return what `harness.registry.networks.transformer.GPT` does, untied and without biases."""
    x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, dtype=bool))
    for i in range(num_layers):
        at = f"h.{i}."
        y = _norm(x, w[at + "norm1.weight"])
        q, k, v = (
            (y @ w[f"{at}attn.{name}.weight"].T).reshape(*x.shape[:2], num_heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
        attention = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        mixed = jnp.einsum("bhts,bshc->bthc", attention, v).reshape(x.shape)
        x = x + mixed @ w[at + "attn.proj.weight"].T
        y = _norm(x, w[at + "norm2.weight"])
        hidden = jax.nn.gelu(y @ w[at + "mlp.0.weight"].T, approximate=False)
        x = x + hidden @ w[at + "mlp.2.weight"].T
    return _norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def _norm(x: Array, weight: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
