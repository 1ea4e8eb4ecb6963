"""Batches: tensors in tuples, lists, dicts, other mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from harness.errors import UserError

Batch = Any
NumTerms = Callable[[Batch], float]


def map_tensors(function: Callable[[torch.Tensor], Any], batch: Batch) -> Batch:
    """Return a batch of the same kind with a function's results in the place of its tensors.

    Goes into tuples, lists and dicts, other mappings such as transformers' `BatchEncoding`, and
    dataclasses.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        fields: dict[str, Any] = {}
        if isinstance(leaf, UserDict | dict):  # copies of others may share what they hold
            fields = dict(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        if not fields:
            return leaf
        changed = {name: map_tensors(function, value) for name, value in fields.items()}
        clone = copy.copy(leaf)
        if isinstance(clone, MutableMapping):
            clone.update(changed)
        else:
            for name, value in changed.items():
                object.__setattr__(clone, name, value)  # the frozen ones, too
        return clone

    return tree_map(of, batch)


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Return the tensors of a batch, in the order in which `map_tensors` meets them."""
    tensors: list[torch.Tensor] = []
    map_tensors(tensors.append, batch)
    return tensors


def leading_size(batch: Batch) -> int:
    """Return the leading dimension that the batch's tensors share (of the first where not)."""
    sizes = [t.shape[0] for t in tensors_of(batch) if t.dim()]
    if not sizes:
        raise UserError(
            f"a batch of type {type(batch).__name__} holds no tensor with a leading dimension; "
            "pass a tensor, or a tuple, list, dict or dataclass of tensors"
        )
    return int(sizes[0])


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start:stop of every tensor that has the batch's leading dimension."""
    size = leading_size(batch)
    return map_tensors(lambda t: t[start:stop] if t.dim() and t.shape[0] == size else t, batch)


def take_most(batch: Batch, num_samples: int, count: NumTerms) -> Batch:
    """Return so many samples in a row of which one has as many terms as any of the batch.

    What a loss of few tokens costs is what its longest sample does.
    """
    size = leading_size(batch)
    most = max(range(size), key=lambda i: float(count(take(batch, i, i + 1))))
    start = max(0, min(most, size - num_samples))
    return take(batch, start, start + num_samples)


def join(first: Batch, second: Batch, whole: Batch) -> Batch | None:
    """Return the samples of two batches as one batch, None if that can't be.

    Args:
        first: Samples.
        second: Samples.
        whole: The batch that they are of, or one like it. Its tensors with its leading dimension
            are samples, which of a piece as small as a tensor that all samples share can't be seen.
            Of one sample it tells no more, and what is the same in both pieces may be either.
    """
    tensors = tensors_of(first), tensors_of(second), tensors_of(whole)
    if len({*map(len, tensors)}) > 1 or not _is_alike(first, second):
        return None
    size, joined = leading_size(whole), []
    for a, b, like in zip(*tensors, strict=True):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            return None
        is_samples = like.shape[:1] == (size,)
        if not is_samples and not torch.equal(a, b):
            return None
        if is_samples and size == 1 and torch.equal(a, b):  # or one that they share
            return None
        joined.append(torch.cat([a, b]) if is_samples else a)
    following = iter(joined)
    return map_tensors(lambda _: next(following), first)


def _is_alike(first: Batch, second: Batch) -> bool:
    """Tell whether what two batches hold beside tensors is the same."""
    try:
        return bool(map_tensors(lambda _: None, first) == map_tensors(lambda _: None, second))
    except (RuntimeError, ValueError):  # arrays, of which it is not one answer
        return False


def batch_hash(batches: Sequence[Batch]) -> str:
    """Return 16 hex digits of the SHA-256 of the batches' samples, independent of the split."""
    digest = hashlib.sha256()
    for tensors in zip(*map(tensors_of, batches), strict=True):
        rows = [t.detach().cpu() for t in tensors]
        digest.update(f"{rows[0].dtype}{tuple(rows[0].shape[1:])}".encode())
        for t in rows:
            plain = t.clone(memory_format=torch.contiguous_format).flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def warn_of_lengths(batches: Sequence[Batch]) -> None:
    """Warn of batches whose samples differ in shape, which count by their samples alone."""
    shapes = [[tuple(t.shape[1:]) for t in tensors_of(batch)] for batch in batches]
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None and len(shapes[other]) == len(shapes[0]):
        a, b = next(
            pair for pair in zip(shapes[0], shapes[other], strict=True) if pair[0] != pair[1]
        )
        warnings.warn(
            f"samples of batch 0 have shape {a}, of batch {other} {b}, and each batch counts by "
            "its number of samples; if the loss averages over tokens or pixels, pass batch_weights "
            "as a function that counts them, such as lambda b: b[1].numel()",
            stacklevel=3,
        )


def place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Move a batch's tensors to the device, floating ones to the dtype too."""

    def move(t: torch.Tensor) -> torch.Tensor:
        t = t.clone() if t.is_inference() else t  # no graph may hold such
        return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

    return map_tensors(move, batch)


def halves(batch: Batch, largest: int, count: NumTerms) -> list[Batch]:
    """Halve a batch of more than half of `largest` samples, leave a smaller one whole.

    A piece without terms, such as one without masked tokens, has no mean and is left out.
    """
    n = leading_size(batch)
    if n <= (largest + 1) // 2:
        return [batch]
    pieces = [take(batch, 0, (n + 1) // 2), take(batch, (n + 1) // 2, n)]
    return [piece for piece in pieces if count(piece) > 0]


def terms(
    batches: Sequence[Batch], batch_weights: Sequence[float] | NumTerms | None
) -> tuple[NumTerms | None, list[float]]:
    """Return how terms are counted (None where only totals are known) and the counts."""
    given = leading_size if batch_weights is None else batch_weights
    if not callable(given) and not isinstance(given, Iterable):
        raise UserError(
            f"batch_weights is {given!r}; pass one number per batch, such as [{given!r}], or a "
            "function that counts the terms of a batch"
        )
    count = partial(_number, given) if callable(given) else None
    terms = [float(t) for t in (map(given, batches) if callable(given) else given)]
    usable = all(0 <= t < float("inf") for t in terms) and sum(terms) > 0
    if len(terms) != len(batches) or not usable:
        raise UserError(
            f"batch_weights gives {terms} for {len(batches)} batches; it must give one number "
            "≥ 0 per batch, not all zero: the number of terms that its mean loss averages"
        )
    return count, terms


def _number(count: NumTerms, batch: Batch) -> float:
    """Return a count as a number: a tensor's quotients would be in its own arithmetic."""
    return float(count(batch))
