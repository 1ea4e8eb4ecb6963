"""The words of columns that hold few, and what they mean: here alone. Imports nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Of rows that have a rule; a zero block has the one node 0.
WITH_RULE = ("ok", "zero")
STATUSES = (*WITH_RULE, "pending", "failed")
# Models and families: their names are those of files, too.
SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
# Names the one file of a table that is not per model.
WHOLE = "all"
# "Adam needed": whether a 95 % interval is above a threshold, below it, or neither.
ANSWERS = ("yes", "no", "unclear")
# Stages of training, by the part of its steps that is done.
FRACTIONS = {"init": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "final": 1.0}
STAGES = tuple(FRACTIONS)
# Of rules; rows of blocks that a caller chose say `custom`.
PARTITIONS = ("weights", "paper", "all", "full", "layers", "heads")
# ranked and reference: entries of protocol 2, those of the leaderboard and those shown beside it.
TIERS = ("demo", "small", "paper", "ranked", "reference")
OPTIMIZERS = ("sgd", "adamw")
# Kinds of the blocks that make attention weights.
ATTENTION = frozenset({"query", "key", "value", "attention"})


# Of models outside the registry: as they came, and along a training of one's own.
_OWN_STAGE = re.compile(r"current|step-(\d+)")


def is_stage(name: str) -> bool:
    """Tell whether rows may be of a stage of that name."""
    return name in FRACTIONS or _OWN_STAGE.fullmatch(name) is not None


def in_order(stages: Iterable[str]) -> list[str]:
    """Return stages as training passes them, each once.

    >>> in_order(["final", "step-200", "step-30", "init", "init"])
    ['init', 'step-30', 'step-200', 'final']
    """

    def place(stage: str) -> tuple[float, int]:
        own = _OWN_STAGE.fullmatch(stage)
        return (0.5, int(own[1] or 0)) if own else (FRACTIONS.get(stage, 1.0), 0)

    return sorted(set(stages), key=place)


def answer(low: float, high: float, threshold: float) -> str:
    """Return whether Adam is needed, one of `ANSWERS`, from the ends of an interval.

    >>> answer(0.6, 0.9, 0.5), answer(0.1, 0.4, 0.5), answer(0.4, 0.6, 0.5)
    ('yes', 'no', 'unclear')
    """
    yes, no, unclear = ANSWERS
    return yes if low > threshold else no if high < threshold else unclear


def listed(words: tuple[str, ...]) -> str:
    """Return words as a text lists them.

    >>> listed(("init", "p10", "final"))
    'init, p10 or final'
    """
    return f"{', '.join(words[:-1])} or {words[-1]}"
