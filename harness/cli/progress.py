"""How far long work is: bars with the remaining time, and JSON lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from harness.errors import UserError, reason_of

if TYPE_CHECKING:
    from harness.campaign.unit import Unit

_LOG_EVERY = 5.0  # seconds between lines of progress
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())


@contextmanager
def progress_bar(
    description: str, *, shown: bool = True, log: Path | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the remaining time; yields a function of (done, total).

    Args:
        description: What is done.
        shown: Show it, if there is a terminal.
        log: File for a JSON line every few seconds.
    """
    # What a command prints may be read by a program, and its errors too.
    console = Console(stderr=True)
    with (
        json_lines(log) as write,
        Progress(
            *_COLUMNS,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        ) as progress,
    ):
        bar = progress.add_task(description, total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)
            left = progress.tasks[bar].time_remaining
            remaining = None if left is None else round(left)
            write("progress", what=description, done=done, total=total, remaining=remaining)

        yield on_progress


@contextmanager
def units_bar(
    total: int, log: Path | None = None
) -> Iterator[Callable[[str, Unit, dict[str, Any]], None]]:
    """Show a bar over units of work; without a terminal, a line per unit that starts.

    Args:
        total: Units that are left.
        log: File for JSON lines.
    """
    console = Console()
    remaining = TextColumn("{task.fields[remaining]}")
    with (
        json_lines(log) as write,
        Progress(*_COLUMNS, TimeElapsedColumn(), remaining, console=console) as progress,
    ):
        bar = progress.add_task("", total=total, remaining="")
        finished = 0

        def on_event(what: str, unit: Unit, facts: dict[str, Any]) -> None:
            nonlocal finished
            finished += what in ("done", "failed")
            seconds = facts.get("remaining")
            left = "" if seconds is None else f"about {timedelta(seconds=seconds)} left"
            # Extensions of a grid come on top of what was counted at the start.
            whole = finished + facts.get("units_left", 0)
            progress.update(bar, completed=finished, total=whole, remaining=left)
            if what == "start":
                progress.update(bar, description=str(unit))
            if what in ("start", "elsewhere") and not console.is_terminal:
                note = "" if what == "start" else " (another process does it; waiting)"
                console.print(f"{unit}{note}", highlight=False, markup=False)
            named = {k: v for k, v in vars(unit).items() if v != "" and k != "ready"}
            write(what, **named, **facts)

        yield on_event


@contextmanager
def json_lines(path: Path | None) -> Iterator[Callable[..., None]]:
    """Yield a function that appends an event to a file as one line of JSON.

    Progress is kept every few seconds only. The last event is end, stopped or failed.

    Raises:
        UserError: The file can't be written to.
    """
    if path is None:
        yield lambda event, **facts: None
        return
    latest = 0.0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", buffering=1)
    except OSError as error:
        raise UserError(f"--log {path} can't be written to: {error.strerror}") from error
    with stream as file:

        def write(event: str, **facts: Any) -> None:
            nonlocal latest
            if event == "progress" and time.monotonic() - latest < _LOG_EVERY:
                return
            latest = time.monotonic()
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            file.write(json.dumps({"time": now, "event": event, **facts}) + "\n")

        write("begin", command=sys.argv[1:], pid=os.getpid())
        try:
            yield write
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            write("stopped" if stopped else "failed", reason="" if stopped else reason_of(error))
            raise
        write("end")
