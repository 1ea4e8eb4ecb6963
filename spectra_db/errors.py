"""Errors whose text is for the user, what others say, and which of the known words was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DatasetError(ValueError):
    """What was asked of a dataset, or what it holds, can't be; the text says what to do."""


class HubError(RuntimeError):
    """The Hub can't be reached, or refuses; the text says what to do."""


class NotFound(DatasetError):  # noqa: N818
    """A table, column, model or source that is not there; the text names close matches."""


def hint(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return close matches of a word; where there are none what to do, or else all that is known.

    >>> hint("spectrum", ("spectra", "gaps")), hint("x", ("a", "b"))
    ('did you mean spectra?', 'known are a, b')
    """
    known = list(known)
    if close := get_close_matches(word, known, n=3):
        return f"did you mean {', '.join(close)}?"
    return f"known are {', '.join(known)}" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)
