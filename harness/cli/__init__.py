"""The command line: parse, call, echo. Heavy imports stand inside the commands."""

from harness.cli import (  # noqa: F401
    compute,
    dataset,
    leaderboard,
    models,
    paper,
    spectrum,
    submission,
)
from harness.cli.base import main

__all__ = ["main"]
