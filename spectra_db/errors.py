"""Errors whose text is for the user, and which of the known words was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DatasetError(ValueError):
    """What was asked of a dataset, or what it holds, can't be; the text says what to do."""


class HubError(RuntimeError):
    """The Hub can't be reached, or refuses; the text says what to do."""


class NotFound(DatasetError):  # noqa: N818
    """A table, column, model or source that is not there; the text names close matches."""


def hint(word: str, known: Iterable[str]) -> str:
    """Return close matches of a word, or all that is known."""
    known = list(known)
    close = get_close_matches(word, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"
