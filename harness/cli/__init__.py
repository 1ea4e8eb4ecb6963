"""The command line: parse, call, echo. Heavy imports stand inside the commands."""

from harness.cli import compute, leaderboard, paper, submission
from harness.cli.base import main

__all__ = ["compute", "leaderboard", "main", "paper", "submission"]
