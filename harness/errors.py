"""The one exception that a mistake of the user raises."""

from __future__ import annotations


class UserError(Exception):
    """Say what was given, what is allowed and what to do, in one line.

    The command line prints the text and exits with code 2.
    """
