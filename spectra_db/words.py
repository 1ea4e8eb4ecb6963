"""The words of columns that hold few: each list stands here alone. Imports nothing."""

from __future__ import annotations

STATUSES = ("ok", "zero", "pending", "failed")
# "Adam needed": whether the 95 % interval of the log2 speed-up is above 0.5, below it, or neither.
ANSWERS = ("yes", "no", "unclear")
# Stages of training, by the part of its steps that is done.
FRACTIONS = {"init": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "final": 1.0}
STAGES = tuple(FRACTIONS)
# Of rules; rows of blocks that a caller chose say `custom`.
PARTITIONS = ("weights", "paper", "all", "full", "layers", "heads")
# ranked and reference: entries of protocol 2, those of the leaderboard and those shown beside it.
TIERS = ("demo", "small", "paper", "ranked", "reference")


def listed(words: tuple[str, ...]) -> str:
    """Return words as a text lists them.

    >>> listed(("init", "p10", "final"))
    'init, p10 or final'
    """
    return f"{', '.join(words[:-1])} or {words[-1]}"
