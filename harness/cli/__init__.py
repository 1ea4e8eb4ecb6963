"""The command line: parse, call, echo. Heavy imports stand inside the commands."""

from harness.cli import (
    compute,
    dataset,
    leaderboard,
    models,
    paper,
    predictors,
    spectrum,
    submission,
    verdict,
)
from harness.cli.base import main

__all__ = [
    "compute",
    "dataset",
    "leaderboard",
    "main",
    "models",
    "paper",
    "predictors",
    "spectrum",
    "submission",
    "verdict",
]
