"""Losses of some of the tokens: of masked ones, and of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

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
        if not self.num_terms(batch):
            raise ValueError("the batch has no term: every target is -100; use larger microbatches")
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def num_terms(self, batch: Batch) -> int:
        """Count the targets that are not -100."""
        return int((batch[1] != IGNORED).sum())

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of the tokens to predict, (B, n, V), n the most of one sequence.

        Of a large vocabulary most of a product is the last layer. In models of transformers' own it
        runs for these tokens alone, where that was seen to change neither values nor gradients. For
        a loss of one's own, all logits, (B, T, V).
        """
        if not self._predicts_targets:
            return super().outputs(model, batch)
        places, head = _places(batch[1]), _head_of(model)
        fewer = 0 < places.shape[1] < batch[1].shape[1] and batch[0].shape[:2] == batch[1].shape
        if head is None or not fewer or type(self).logits is not Task.logits:
            return self._logits_at(places, model, batch)
        if model not in _runs_for_some and not model.training:  # dropout is never the same twice
            _runs_for_some[model] = self._is_same(model, head, batch)
        if not _runs_for_some.get(model):
            return self._logits_at(places, model, batch)
        with _only_at(places, head):
            return self.logits(model, batch)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss, given the logits of the tokens to predict."""
        if self._predicts_targets:
            batch = (batch[0], batch[1].gather(1, _places(batch[1])))
        return super().criterion(outputs, batch)

    @property
    def _predicts_targets(self) -> bool:
        """Whether the loss is of the targets alone: no subclass has another."""
        return type(self).loss_of is SomeTokens.loss_of

    def _logits_at(self, places: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        """Return those of all logits that are of positions (B, n).

        Raises:
            ValueError: There is not one row for each token.
        """
        logits = self.logits(model, batch)
        if logits.dim() != 3 or logits.shape[:2] != batch[1].shape:
            raise ValueError(
                f"the logits have shape {tuple(logits.shape)}, the targets "
                f"{tuple(batch[1].shape)}; the model must give a row of logits for each token"
            )
        return _at(places, logits)

    def _is_same(self, model: nn.Module, head: nn.Module, batch: Batch) -> bool:
        """Tell whether the last layer gives the same for some tokens alone, gradients included.

        Of tokens drawn at random: those to predict may be all at the start, where positions are the
        same. Gradients tell what values don't, such as a shift that begins at zero.
        """
        g = torch.Generator().manual_seed(0)
        size, length = batch[1].shape
        order = torch.rand(size, length, generator=g).argsort(dim=1)
        places = order[:, : max(1, length // 3)].to(batch[1].device)
        parameters = [p for p in model.parameters() if p.requires_grad]

        def seen(chances: Tensor) -> tuple[Tensor, ...]:
            weights = torch.rand(chances.shape, generator=g.manual_seed(1)).to(chances)
            slopes = torch.autograd.grad((weights * chances).sum(), parameters, allow_unused=True)
            unused = chances.new_zeros(1)
            return chances.detach(), *(unused if slope is None else slope for slope in slopes)

        # What these graphs keep is not what the caller's does, which may be counted.
        keeps = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), keeps:
            expected = seen(self._logits_at(places, model, batch).softmax(-1))
            try:
                with _only_at(places, head):
                    found = seen(self.logits(model, batch).softmax(-1))
            except Exception:  # the layer is given something else, or a hook of its own fails
                return False
        floor = 1e-5 * torch.stack([slope.float().norm() for slope in expected[1:]]).norm()
        return all(
            a.shape == b.shape and bool((a - b).float().norm() <= 1e-3 * b.float().norm() + floor)
            for a, b in zip(found, expected, strict=True)
        )


# Models whose outputs have been seen: whether their last layer runs for some tokens alone.
_runs_for_some: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _head_of(model: nn.Module) -> nn.Linear | None:
    """Return the layer that makes logits of hidden states, of a model of transformers' own."""
    is_theirs = type(model).__module__.startswith("transformers.models.")
    find: Any = getattr(model, "get_output_embeddings", None) if is_theirs else None
    head = None if find is None else find()
    return head if type(head) is nn.Linear else None


def _places(targets: Tensor) -> Tensor:
    """Return the positions of the targets, (B, n); where a sequence has fewer, others follow."""
    is_target = targets != IGNORED
    most = int(is_target.sum(1).max())
    return is_target.sort(dim=1, descending=True, stable=True).indices[:, :most]


def _at(places: Tensor, values: Tensor) -> Tensor:
    """Return values (B, T, C) at positions (B, n)."""
    return values.take_along_dim(places.unsqueeze(2), 1)


def _only_at(places: Tensor, layer: nn.Module) -> RemovableHandle:
    """Let a layer of (B, T, C) take the positions (B, n) alone, until what is returned is left."""
    return layer.register_forward_pre_hook(lambda _, inputs: (_at(places, inputs[0]),))
