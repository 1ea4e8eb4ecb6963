"""The loss that progress is measured from."""

from __future__ import annotations

from harness.registry.entry import ModelEntry


def reference_loss(entry: ModelEntry, init_loss: float, entropy: float | None) -> float:
    """Return R, the loss of having learnt nothing.

    R = min(I, H), H being the entropy of the targets' marginal: to know how often each target
    occurs is not yet to know the task. R = I where a pretrained model starts, which knows that
    already, and where the targets are no classes.
    """
    if entropy is None or entry.pretrained is not None:
        return init_loss
    return min(init_loss, entropy)
