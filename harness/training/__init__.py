"""SGD and AdamW runs: the loop, the grid of learning rates, the stages, the gap, the problem.

Exports are resolved on first use, so that the grid and the gap run without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Problem": "problem",
    "TrainingRun": "loop",
    "load_problem": "problem",
    "train": "loop",
}
__all__ = ["Problem", "TrainingRun", "load_problem", "train"]


def __getattr__(name: str) -> Any:
    """Import an export of this package when it is first used."""
    if name in __all__:
        return getattr(import_module(f"harness.training.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'harness.training' has no attribute {name!r}")
