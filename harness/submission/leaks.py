"""Whether a model sees what it is to predict: its targets, or tokens that come later."""

from __future__ import annotations

import copy

import torch
from torch import nn

from harness.estimator.batches import Batch
from harness.estimator.checks import fixed_arithmetic
from harness.submission.subject import Caution, Failed, Subject
from harness.tasks.base import IGNORED

_POSITIONS = 16  # tokens that are changed, one at a time
# Of the largest logit: what moves less is rounding.
_TOLERANCE = 100 * torch.finfo(torch.float32).eps
_SCALE = 0.02  # of what stands in for parameters that are zero, which would hide a leak


def leaks(s: Subject) -> str:
    """Change the targets, and one token of a sequence at a time; see which logits move."""
    with fixed_arithmetic(s.model), torch.no_grad():
        model = _without_zeros(s.model)
        if _moved(s.task.logits(model, s.mates), s.task.logits(model, s.mates)).any():
            raise Caution(
                "two passes differ, so what the logits know can't be told; let nothing be random "
                "in evaluation mode (F.dropout is on there unless it gets training=self.training)"
            )
        told = [_of_targets(s, model), _of_tokens(s, model)]
    return "; ".join(text for text in told if text) or "neither classes nor tokens to see"


def _of_targets(s: Subject, model: nn.Module) -> str:
    if (targets := s.task.targets(s.mates)) is None:
        return ""
    flat = [t.flatten() for t in s.mates]
    # Which tensors of a batch, the first left out, are the targets.
    alike = [i for i, t in enumerate(flat) if i and torch.equal(t[t != IGNORED], targets)]
    if not alike:
        return ""
    place = alike[-1]
    batch = tuple(t.flip(0) if i == place else t for i, t in enumerate(s.mates))
    if _moved(s.task.logits(model, batch), s.task.logits(model, s.mates)).any():
        raise Failed(
            "the logits change with the targets: forward, or `logits` of the task, gets what it is "
            f"to predict; give it the inputs alone (or, if tensor {place} of a batch is no target, "
            "let `targets` of the task return None)"
        )
    return "the logits don't know the targets"


def _of_tokens(s: Subject, model: nn.Module) -> str:
    inputs = s.mates[0]
    if s.task.causal is None or inputs.dim() != 2 or inputs.shape[1] < 2:
        return ""
    vocab_size = s.data.model_options.get("vocab_size") or int(inputs.max()) + 1
    changed, rows = _one_token_changed(s.mates, vocab_size)
    logits = s.task.logits(model, rows)
    if logits.dim() != 3 or logits.shape[1] != inputs.shape[1]:
        return ""
    moved = _moved(logits[1:], logits[:1]).any(-1)  # (tokens changed, positions)
    early = [(t, int(moved[i, :t].nonzero()[-1])) for i, t in _seen(changed, moved, before=True)]
    if s.task.causal:
        if early:
            t, position = early[0]
            raise Failed(
                f"the logits of position {position} change with token {t}, which comes after it: "
                "the model sees what it is to predict. Mask the attention (is_causal=True, or a "
                "triangular mask), pad convolutions on the left alone, and mix or normalise "
                "nothing over all positions"
            )
        return f"no token of {len(changed)} moves logits before it"
    late = _seen(changed, moved, before=False)
    blind = [w for w, seen in (("after", early), ("before", late)) if not seen]
    if blind:
        raise Caution(
            f"no position sees the tokens {' or '.join(blind)} it, and the task masks some amid "
            "the others: is it a causal model? A task of text would suit it"
        )
    return "positions see the tokens on both sides"


def _one_token_changed(batch: Batch, vocab_size: int) -> tuple[list[int], Batch]:
    """Return positions, and a batch of one sequence as it is and with each of them changed."""
    length = batch[0].shape[1]
    count = min(_POSITIONS, length)
    positions = sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})
    rows = tuple(x[:1].repeat(1 + len(positions), *[1] * (x.dim() - 1)) for x in batch)
    for row, t in enumerate(positions, 1):
        rows[0][row, t] = (rows[0][row, t] + vocab_size // 2) % vocab_size
    return positions, rows


def _seen(changed: list[int], moved: torch.Tensor, *, before: bool) -> list[tuple[int, int]]:
    """List the rows whose changed token moved logits before it, or after it."""
    rows = enumerate(changed)
    return [(i, t) for i, t in rows if (moved[i, :t] if before else moved[i, t + 1 :]).any()]


def _moved(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (logits - others).abs() > _TOLERANCE * others.abs().max()


def _without_zeros(model: nn.Module) -> nn.Module:
    """Return a copy in which no parameter is all zeros, as heads and branches may begin."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.copy_(_SCALE * torch.randn(parameter.shape, generator=generator))
    return model
