"""The systems of the paper."""

from __future__ import annotations

from harness.registry.entry import ModelEntry

ENTRIES: tuple[ModelEntry, ...] = ()
