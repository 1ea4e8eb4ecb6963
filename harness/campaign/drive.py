"""The one loop of all engines: start, submit, wait for the first, settle."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import replace

from harness.campaign.agenda import Agenda
from harness.campaign.engines import Engine
from harness.campaign.unit import Unit

_LOOK = 1.0  # seconds between looks at how far the units in flight are, and what is free


def drive(agenda: Agenda, engine: Engine) -> None:
    """Keep an engine busy with what is ready.

    When a worker dies its unit's future is broken. Where several are, as when all workers of a
    pool end with it, none can be told to be the cause: they are tried again one at a time, and one
    that dies alone is lost.

    Args:
        agenda: What there is to do.
        engine: What does it; closed at the end.

    Raises:
        OSError: A unit could not write.
    """
    with ExitStack() as stack:
        stack.push(engine.close)
        _Driver(agenda, engine, stack).run()


class _Driver:
    """The units in flight."""

    def __init__(self, agenda: Agenda, engine: Engine, stack: ExitStack) -> None:
        self._agenda, self._engine, self._stack = agenda, engine, stack
        self._running: dict[Future[str | None], Unit] = {}
        self._suspects: list[Unit] = []
        self._alone: Unit | None = None  # a suspect that is tried again
        self._refused = False  # by an engine whose workers died since the last look
        self._parts: Counter[Unit] = Counter()  # in flight, of a spectrum that is cut
        self._claims: dict[Unit, ExitStack] = {}

    def run(self) -> None:
        """Do all there is to do."""
        while True:
            self._fill()
            if not (self._running or self._refused):
                if self._agenda.wait():
                    continue
                return
            done, _ = wait(self._running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            for unit, fraction in self._engine.progress():
                if unit in self._running.values():
                    self._agenda.progress(unit, fraction)
            broken = {f for f in done if isinstance(f.exception(), BrokenExecutor)}
            for future in done - broken:
                self._end(self._running.pop(future), future.result())
            if broken or self._refused:
                self._bury(broken)

    def _bury(self, broken: set[Future[str | None]]) -> None:
        """Note which units died with their workers, or try them again one at a time."""
        dead = list(self._running) if self._engine.dies_whole else broken
        lost = [self._running.pop(future) for future in dead]
        if self._engine.dies_whole and (len(lost) > 1 or self._refused):
            self._suspects += lost
        else:
            for unit in lost:
                self._end(unit, None, died=True)
        self._engine.revive()
        self._refused = False

    def _fill(self) -> None:
        """Submit what there is room for; a suspect has the engine for itself."""
        while not self._refused and len(self._running) < self._engine.slots():
            if self._running and (self._suspects or self._alone in self._running.values()):
                return
            if self._suspects:
                self._alone = self._suspects.pop()
                self._submit(self._alone)
            elif unit := self._agenda.start():
                self._begin(unit)
            else:
                return

    def _begin(self, unit: Unit) -> None:
        """Submit a unit, in parts where the engine cuts it."""
        parts = self._engine.parts(unit)
        claim = ExitStack()
        # While parts are taken, the spectrum is this run's.
        if len(parts) < 2 or not claim.enter_context(self._agenda.claim(unit)):
            claim.close()
            self._submit(unit)  # which finds out that it is another's
            return
        self._claims[unit] = self._stack.enter_context(claim)
        self._parts[unit] = len(parts)
        for part in parts:
            self._submit(part)

    def _submit(self, unit: Unit) -> None:
        try:
            self._running[self._engine.submit(unit)] = unit
        except BrokenExecutor:
            self._suspects.append(unit)
            self._refused = True

    def _end(self, unit: Unit, reason: str | None, *, died: bool = False) -> None:
        whole = replace(unit, blocks=())
        if unit != whole:
            self._parts[whole] -= 1
            if not self._parts[whole]:
                # Tries again what failed, and has the derived tables follow.
                self._claims.pop(whole).close()
                self._submit(whole)
        elif died:
            self._agenda.lost(unit)
        else:
            self._agenda.settle(unit, reason)
