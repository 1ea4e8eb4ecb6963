"""Losses of some of the tokens: of masked ones, and of answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.tasks.base import IGNORED, Batch, Task


@dataclass(frozen=True)
class SomeTokens(Task):
    """Predict some tokens; a batch is (inputs, targets), both (B, T) int64, -100 for the others."""

    metric: ClassVar[str] = "loss"

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Average the cross entropy over the targets that are not -100; logits are (B, T, V).

        Raises:
            ValueError: every target is -100, so that the mean would be 0/0.
        """
        targets = batch[1]
        if not bool((targets != IGNORED).any()):
            raise ValueError("the batch has no term: every target is -100; use larger microbatches")
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def num_terms(self, batch: Batch) -> int:
        """Count the targets that are not -100."""
        return int((batch[1] != IGNORED).sum())

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of the tokens to predict, (B, n, V), n the most of one sequence.

        Of a large vocabulary most of a product is the last layer. In models of transformers, where
        what follows it is of each token by itself, it runs for these tokens alone.
        """
        if not self._predicts_targets:
            return super().outputs(model, batch)
        places = _places(batch[1])
        head = _head_of(model)
        if head is not None and 0 < places.shape[1] < batch[1].shape[1]:
            if model not in _runs_for_some:
                _runs_for_some[model] = self._is_same(model, head, batch, places)
            if _runs_for_some[model]:
                with _only_at(places, head):
                    return self.logits(model, batch)
        return self._logits_at(places, model, batch)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss, given the logits of the tokens to predict."""
        if self._predicts_targets:
            batch = (batch[0], batch[1].gather(1, _places(batch[1])))
        return super().criterion(outputs, batch)

    @property
    def _predicts_targets(self) -> bool:
        """Whether the loss is of the targets alone, as long as nobody has put another there."""
        return type(self).loss_of is SomeTokens.loss_of

    def _logits_at(self, places: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        """Return those of all logits that are of positions (B, n).

        Raises:
            ValueError: There is not one row for each token.
        """
        logits = self.logits(model, batch)
        if logits.shape[:2] != batch[1].shape:
            raise ValueError(
                f"the logits have shape {tuple(logits.shape)}, the targets "
                f"{tuple(batch[1].shape)}; the model must give a row of logits for each token"
            )
        return _at(places, logits)

    @torch.no_grad()
    def _is_same(self, model: nn.Module, head: nn.Module, batch: Batch, places: Tensor) -> bool:
        """Tell whether the last layer gives the same logits for these tokens alone."""
        expected = self._logits_at(places, model, batch)
        try:
            with _only_at(places, head):
                found = self.logits(model, batch)
        except (RuntimeError, IndexError):  # it runs on something else
            return False
        scale = float(expected.abs().median())  # not that of words that are ruled out
        # Nothing can be seen of a head that is zero.
        is_same = scale > 0 and found.shape == expected.shape
        return is_same and torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * scale)


# Models whose outputs have been seen: whether their last layer runs for some tokens alone.
_runs_for_some: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _head_of(model: nn.Module) -> nn.Linear | None:
    """Return the layer that makes logits of hidden states, of a model of transformers' own."""
    is_theirs = type(model).__module__.startswith("transformers.models.")
    head: Any = cast("Any", model).get_output_embeddings() if is_theirs else None
    return head if type(head) is nn.Linear else None


def _places(targets: Tensor) -> Tensor:
    """Return the positions of the targets, (B, n); where a sequence has fewer, others follow."""
    is_target = targets != IGNORED
    most = int(is_target.sum(1).max())
    return is_target.sort(dim=1, descending=True, stable=True).indices[:, :most]


def _at(places: Tensor, values: Tensor) -> Tensor:
    """Return values (B, T, C) at positions (B, n)."""
    return values.take_along_dim(places.unsqueeze(2), 1)


@contextmanager
def _only_at(places: Tensor, layer: nn.Module) -> Iterator[None]:
    """Let a layer of (B, T, C) take the positions (B, n) alone."""
    hook = layer.register_forward_pre_hook(lambda _, inputs: (_at(places, inputs[0]),))
    try:
        yield
    finally:
        hook.remove()
