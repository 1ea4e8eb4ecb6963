"""Which units are ready, which were tried, and how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from harness.campaign.claims import claim
from harness.campaign.pace import Pace
from harness.campaign.unit import Unit
from harness.campaign.work import ELSEWHERE, Job, note_failure
from harness.errors import OutputError
from harness.registry import ModelEntry
from spectra_db import store

# Told what happened to a unit, and facts: reason, seconds, fraction of the unit, seconds remaining.
Event = Callable[[str, Unit, dict[str, Any]], None]
OnFinished = Callable[[ModelEntry, dict[Unit, str]], None]

PATIENCE = 2.0  # seconds between looks at what other processes do


class Agenda:
    """What is to do of some entries, from where the folder stands.

    Args:
        live: The entries.
        job: Where and how.
        on_event: Told of units: start, progress, done, failed or elsewhere.
        on_finished: Called with an entry of which nothing is left, and what failed.
        pace: What the time that is left is told from.
    """

    def __init__(
        self,
        live: Sequence[ModelEntry],
        job: Job,
        on_event: Event = lambda what, unit, facts: None,
        on_finished: OnFinished = lambda entry, failed: None,
        pace: Pace | None = None,
    ) -> None:
        self._job, self._on_event, self._on_finished = job, on_event, on_finished
        self._pace = pace or Pace({})
        self._left = {entry.name: job.missing(entry) for entry in live}
        self._tried: set[Unit] = set()
        self._elsewhere: set[Unit] = set()
        self.failed: dict[Unit, str] = {}

    def start(self) -> Unit | None:
        """Return a unit that could start now and was not tried, if there is one."""
        for unit in (unit for units in self._left.values() for unit in units):
            if unit.ready and unit not in self._tried:
                self._tried.add(unit)
                self._pace.start(unit)
                self._tell("start", unit)
                return unit
        return None

    def progress(self, unit: Unit, fraction: float) -> None:
        """Note how far a unit is."""
        self._pace.progress(unit, fraction)
        self._tell("progress", unit, fraction=round(fraction, 4))

    def settle(self, unit: Unit, reason: str | None) -> None:
        """Note how a unit ended, and look what waited for it."""
        seconds = round(self._pace.finish(unit, counts=reason is None), 3)
        self._check_folder(unit)
        if reason == ELSEWHERE:
            if unit not in self._elsewhere:
                self._tell("elsewhere", unit)
            self._elsewhere.add(unit)
            self._look(unit.model)
            return
        self._elsewhere.discard(unit)
        if reason is not None:
            self.failed[unit] = reason
        self._look(unit.model)
        if reason is None:
            self._tell("done", unit, seconds=seconds)
        else:
            self._tell("failed", unit, seconds=seconds, reason=reason)

    def lost(self, unit: Unit) -> None:
        """Note that the process that did a unit died."""
        reason = "the worker process died: out of memory, or killed"
        note_failure(unit, self._job, reason)
        self.settle(unit, reason)

    def claim(self, unit: Unit) -> AbstractContextManager[bool]:
        """Take a unit for this process, as `claims.claim`."""
        return claim(self._job.ledger.folder, unit)

    def wait(self) -> bool:
        """Wait for units that other processes do; tell whether there are any."""
        left = {unit for units in self._left.values() for unit in units}
        theirs = self._elsewhere & left
        if not theirs:
            return False
        time.sleep(PATIENCE)
        for model in {unit.model for unit in theirs}:
            self._look(model)
        for unit in theirs:
            with self.claim(unit) as ours:
                if ours:  # it was done, or its process ended before that
                    self._tried.discard(unit)
        return True

    def _check_folder(self, unit: Unit) -> None:
        """Raise if the folder was removed: a unit makes it anew, without what was in it.

        The row of table `models` is written before any unit starts, and by nothing else.
        """
        out = self._job.ledger.folder
        if not store.path_of(out, "models", unit.model).is_file():
            raise OutputError(
                f"{out} was removed, or emptied, while this ran, and what was finished is gone "
                "with it; the same command begins anew"
            )

    def _look(self, model: str) -> None:
        """Look again what is left of a model and of those that start from it."""
        for name in self._left:
            entry = self._job.entries[name]
            if model in (name, entry.pretrained):
                self._left[name] = self._job.missing(entry)
                if not self._left[name]:  # others may take hours yet
                    self._on_finished(entry, self.failed)

    def _tell(self, what: str, unit: Unit, **facts: Any) -> None:
        left = [unit for units in self._left.values() for unit in units]
        open_ = [unit for unit in left if unit not in self.failed]
        remaining = self._pace.remaining(open_)
        facts |= {"units_left": len(open_), "remaining": remaining and round(remaining)}
        self._on_event(what, unit, facts)
